"""The documentation says what the API does, and comes from this server alone."""

import json
import re

import pytest

ELSEWHERE = re.compile(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", re.IGNORECASE)


def test_docs_show_swagger_ui_with_assets_that_exist(client):
    page = client.get("/docs")

    assert page.status_code == 200
    assert page.mimetype == "text/html"
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) == 4
    for asset in assets:
        assert client.get(asset).status_code == 200, asset
    assert 'data-openapi="/openapi.json"' in page.text
    assert "SwaggerUIBundle({" in client.get("/docs/start.js").text


@pytest.mark.parametrize("path", ["/docs", "/docs/start.js", "/openapi.json"])
def test_no_documentation_page_names_another_server(client, path):
    # One of an example: nobody's (RFC 2606).
    assert not ELSEWHERE.search(client.get(path).text.replace("https://example.com", ""))


def test_the_policy_keeps_the_browser_from_other_servers(client):
    policy = client.get("/docs").headers["Content-Security-Policy"]

    assert "default-src 'self'" in policy
    assert "script-src" not in policy
    assert "<script>" not in client.get("/docs").text


def test_the_bare_address_leads_to_the_docs(client):
    answer = client.get("/")

    assert (answer.status_code, answer.headers["Location"]) == (302, "/docs")


@pytest.mark.parametrize("name", ["../__init__.py", "%2e%2e/__init__.py", "none.css", "../../../../etc/passwd"])
def test_no_other_file_can_be_had(client, name):
    assert client.get(f"/docs/{name}").status_code == 404


def test_the_document_describes_every_api_route(client, app):
    document = client.get("/openapi.json").json
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}

    # What the console asks is between the two of them.
    rules = [rule for rule in app.url_map.iter_rules() if re.match("/(api/v1/(?!console)|v1/)", rule.rule)]
    served = {
        (method, re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule))
        for rule in rules
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert served <= described
    assert document["openapi"].startswith("3.0")


def test_the_document_has_the_seeds_example_both_keys_and_the_problem(client):
    document = client.get("/openapi.json").json
    body = document["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]

    assert body["examples"]["llm"]["value"]["params"]["messages"][1]["content"] == "你好，请介绍一下自己"
    assert {scheme["type"] for scheme in document["components"]["securitySchemes"].values()} == {"apiKey", "http"}
    responses = document["components"]["responses"]
    # Under /v1, errors are as OpenAI writes them.
    problems = [list(response["content"]) for name, response in responses.items() if name != "OPENAI_ERROR"]
    assert set(map(tuple, problems)) == {("application/problem+json",)}
    assert document["components"]["schemas"]["LlmParams"]["properties"]["temperature"]["maximum"] == 2
    params = document["components"]["schemas"]["JobCreate"]["properties"]["params"]
    kinds = ("Llm", "ImageGen", "Vision", "Whisper", "Embedding", "Comfyui", "Triton")
    assert params["oneOf"] == [{"$ref": f"#/components/schemas/{kind}Params"} for kind in kinds]


def test_the_example_of_the_document_is_accepted(client):
    document = client.get("/openapi.json").json
    content = document["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]

    for example in content["examples"].values():
        assert client.post("/api/v1/jobs", json=example["value"]).status_code == 202


def test_every_reference_of_the_document_leads_somewhere(client):
    document = client.get("/openapi.json").json
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        place = document
        for step in reference.split("/"):
            place = place[step]
