-- A worker hands in the outcome of an attempt it holds.
-- KEYS: job, sequence, news, running set of the worker, Celery's result, list that waiters block on, speed,
--       reliability of the worker's name, speed of the model that ran
-- ARGV: id, attempt, worker, envelope, Celery's result entry, seconds to keep, seconds it ran (completed) or '',
--       good outcomes and faults that it counts for the worker, half-life of those counts in seconds,
--       most entries of a job's stream, seconds to keep it, then number and text of its last entries
-- Returns 1 if taken, 0 if the fence no longer holds
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'worker', 'started', 'begun')
local started = record[4] or ''
redis.call('SREM', KEYS[4], ARGV[1])
-- Our own outcome, handed in again because the answer was lost on the way.
if record[1] == 'ended' and record[2] == ARGV[2] and record[3] == ARGV[3] then return 1 end
-- A record that is gone (the store was emptied) takes the outcome all the same: the row's own guard decides.
if record[1] and not (record[1] == 'running' and record[2] == ARGV[2] and record[3] == ARGV[3]) then
  redis.call('INCR', 'discarded')
  return 0
end
redis.call('HSET', KEYS[1], 'state', 'ended', 'attempt', ARGV[2], 'worker', ARGV[3], 'outcome', ARGV[4])
redis.call('HDEL', KEYS[1], 'params', 'ticket', 'progress', 'begun')
if record[5] then redis.call('ZREM', record[5], ARGV[1]) end
redis.call('EXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), ARGV[1])
redis.call('SET', KEYS[5], ARGV[5], 'EX', ARGV[6])
redis.call('PUBLISH', KEYS[5], ARGV[5])
redis.call('RPUSH', KEYS[6], started .. ' ' .. ARGV[4])
redis.call('EXPIRE', KEYS[6], 60)
-- Whoever follows it has all that it said before he hears of the end.
if record[4] then
  for i = 13, #ARGV, 2 do say(ARGV[1], record[4], ARGV[2], ARGV[i], ARGV[i + 1], ARGV[11], ARGV[12]) end
end
hush(ARGV[1], record[4], ARGV[2], ARGV[12])
local good, faults = tonumber(ARGV[8]), tonumber(ARGV[9])
if good + faults > 0 then count(KEYS[8], good, faults, tonumber(ARGV[10])) end
if ARGV[7] ~= '' then
  -- Running mean that forgets: half the weight after 20 jobs.
  for _, speed in ipairs({KEYS[7], KEYS[9]}) do
    local n = redis.call('HINCRBY', speed, 'jobs', 1)
    local mean = tonumber(redis.call('HGET', speed, 'mean_s') or '0')
    local weight = math.max(1 / n, 0.0341)
    redis.call('HSET', speed, 'mean_s', tostring(mean + weight * (tonumber(ARGV[7]) - mean)))
    redis.call('EXPIRE', speed, 30 * 24 * 3600)
  end
end
return 1
