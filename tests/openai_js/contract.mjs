// The official JavaScript client against a running server: node contract.mjs BASE_URL KEY REFUSED_KEY SPEECH_FILE
// Ends with exit code 0 if everything that OpenAI's contract promises held, else with the assertion that failed.

import assert from "node:assert/strict";
import { createReadStream } from "node:fs";

import OpenAI from "openai";

const [baseURL, apiKey, refusedKey, speech] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const ask = (content) => ({ model: "echo", messages: [{ role: "user", content }] });

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.ok(models.includes("echo"));
assert.equal((await client.models.retrieve("echo")).object, "model");

const { data: chat, response } = await client.chat.completions.create(ask("one two three")).withResponse();
assert.equal(chat.choices[0].message.content, "one two three");
assert.equal(chat.choices[0].finish_reason, "stop");
assert.equal(chat.usage.total_tokens, 6);
assert.ok(chat.id.endsWith(response.headers.get("x-job-id")));

let text = "";
let usage = null;
const reasons = [];
const stream = await client.chat.completions.create({
  ...ask("four five six"),
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  if (chunk.choices[0]?.finish_reason) reasons.push(chunk.choices[0].finish_reason);
  usage = chunk.usage ?? usage;
}
assert.equal(text, "four five six");
assert.deepEqual(reasons, ["stop"]);
assert.equal(usage.completion_tokens, 3);

const helped = client.chat.completions.stream(ask("seven eight"));
assert.equal((await helped.finalChatCompletion()).choices[0].message.content, "seven eight");

const completion = await client.completions.create({ model: "echo", prompt: "nine ten" });
assert.equal(completion.choices[0].text, "nine ten");

// Without an encoding_format it asks for base64, and gives numbers.
const embedded = await client.embeddings.create({ model: "echo", input: ["a", "b"] });
assert.equal(embedded.data.length, 2);
const [x, y] = embedded.data[0].embedding;
assert.ok(Math.abs(x * x + y * y - 1) < 1e-6);

const images = await client.images.generate({ model: "echo", prompt: "a red circle", size: "64x64", n: 2 });
assert.equal(images.data.length, 2);
assert.equal(Buffer.from(images.data[0].b64_json, "base64").subarray(1, 4).toString(), "PNG");

const heard = await client.audio.transcriptions.create({ model: "echo", file: createReadStream(speech) });
assert.equal(typeof heard.text, "string");
const translated = await client.audio.translations.create({ model: "echo", file: createReadStream(speech) });
assert.equal(typeof translated.text, "string");

const refused = new OpenAI({ baseURL, apiKey: refusedKey, maxRetries: 0 });
await assert.rejects(refused.models.list(), (error) => error instanceof OpenAI.AuthenticationError);
await assert.rejects(client.chat.completions.create({ ...ask("x"), model: "none-such" }), (error) => {
  return error instanceof OpenAI.NotFoundError && error.code === "model_not_found";
});
await assert.rejects(client.chat.completions.create({ ...ask("x"), n: 99 }), (error) => {
  return error instanceof OpenAI.BadRequestError && error.param === "n";
});
await assert.rejects(client.chat.completions.create(ask("fail")), (error) => {
  return error instanceof OpenAI.InternalServerError && error.type === "server_error";
});
await assert.rejects(async () => {
  for await (const _ of await client.chat.completions.create({ ...ask("fail"), stream: true }));
}, OpenAI.APIError);
