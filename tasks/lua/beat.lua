-- A worker renews its one lease, and hears what became of the jobs it runs and what it was told.
-- KEYS: lease, workers, running set of the worker, cards, lost, names, orders
-- ARGV: worker, lease in ms, card, name, then the ids it runs
-- Returns {cancelled ids, ids it no longer holds, ids the record says it runs but it did not name, 1 if it must drain}
local time = redis.call('TIME')
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
local shown = redis.call('HSET', KEYS[4], ARGV[1], ARGV[3])
-- One that begins a job before its first beat stands among the workers already, but shows no card.
if redis.call('ZADD', KEYS[2], time[1], ARGV[1]) + shown > 0 then
  -- It has come, or come back. Whoever had the name before it and is lost is no longer missed.
  local before = redis.call('HGET', KEYS[6], ARGV[4])
  if before and before ~= ARGV[1] and redis.call('ZREM', KEYS[5], before) == 1 then
    redis.call('HDEL', KEYS[4], before)
  end
  redis.call('HSET', KEYS[6], ARGV[4], ARGV[1])
  redis.call('ZREM', KEYS[5], ARGV[1])
end
local cancelled, lost, ghosts, named = {}, {}, {}, {}
for i = 5, #ARGV do
  named[ARGV[i]] = true
  local record = redis.call('HMGET', 'job:' .. ARGV[i], 'state', 'worker', 'cancel')
  if record[1] and not (record[1] == 'running' and record[2] == ARGV[1]) then
    lost[#lost + 1] = ARGV[i]
  elseif record[3] then
    cancelled[#cancelled + 1] = ARGV[i]
  end
end
for _, id in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  if not named[id] then ghosts[#ghosts + 1] = id end
end
local drained = redis.call('HEXISTS', KEYS[7], ARGV[4])
-- An order is dropped a long while after the last worker of its name was there.
if drained == 1 then redis.call('HSET', KEYS[7], ARGV[4], time[1]) end
return {cancelled, lost, ghosts, drained}
