-- What workers left behind whose lease has ended. One that went without a word is counted once, and shown as lost.
-- KEYS: workers, ended, cards, lost, names
-- ARGV: lease in s, seconds to show a lost worker, faults of a loss, half-life of the counts in s
-- Returns {worker, job, worker, job, ...}: the jobs that must be taken from the dead. From now on nobody begins the attempt
-- that was lost: it has a next one, even if that is held up on its way while the broker hands out the message once more.
local now = tonumber(redis.call('TIME')[1])
local function card_of(worker)
  local read, card = pcall(cjson.decode, redis.call('HGET', KEYS[3], worker) or '')
  if not read or type(card) ~= 'table' then card = {} end
  return card.name or worker, card.state
end
local function forget(worker)
  local name = card_of(worker)
  redis.call('HDEL', KEYS[3], worker)
  if redis.call('HGET', KEYS[5], name) == worker then redis.call('HDEL', KEYS[5], name) end
end
local orphans = {}
local function take_from(worker)
  if redis.call('EXISTS', 'lease:' .. worker) == 1 then return end
  local jobs = redis.call('SMEMBERS', 'running:' .. worker)
  for _, id in ipairs(jobs) do
    if redis.call('HGET', 'job:' .. id, 'worker') == worker then redis.call('HSET', 'job:' .. id, 'lost', 1) end
    orphans[#orphans + 1] = worker
    orphans[#orphans + 1] = id
  end
  if #jobs > 0 then return end
  local beat = redis.call('ZSCORE', KEYS[1], worker)
  redis.call('ZREM', KEYS[1], worker)
  redis.call('SREM', KEYS[2], worker)
  -- No card: it said goodbye.
  if not beat or redis.call('HEXISTS', KEYS[3], worker) == 0 then return end
  local name, state = card_of(worker)
  -- One that never got ready failed nobody.
  if state ~= 'loading' then count('reliability:' .. name, 0, tonumber(ARGV[3]), tonumber(ARGV[4])) end
  if redis.call('HGET', KEYS[5], name) == worker then
    redis.call('ZADD', KEYS[4], beat, worker)
  else
    -- Its successor is there already.
    redis.call('HDEL', KEYS[3], worker)
  end
end
for _, worker in ipairs(redis.call('SMEMBERS', KEYS[2])) do take_from(worker) end
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[1]))) do take_from(worker) end
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now - tonumber(ARGV[2]))) do
  redis.call('ZREM', KEYS[4], worker)
  forget(worker)
end
return orphans
