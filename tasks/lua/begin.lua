-- A worker asks whether it may run the attempt that a message names.
-- KEYS: job, sequence, news
-- ARGV: id, attempt, worker, token of this delivery, most deliveries
-- Returns {answer, params, timeout in seconds, ticket}; all but the answer with RUN only
local function run()
  local given = redis.call('HMGET', KEYS[1], 'params', 'timeout_s', 'ticket')
  return {'RUN', given[1], given[2], given[3] or ''}
end
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'worker', 'token', 'cancel', 'wait',
  'lost')
local state, attempt, worker, token, cancel, wait, lost =
  record[1], record[2], record[3], record[4], record[5], record[6], record[7]
-- No record: cancelled and swept, or the store was emptied. The row knows, and sends again what must run.
if not state then return {'STALE'} end
if state == 'ended' then return {'DONE'} end
if cancel then return {'CANCELLED'} end
-- One that moved on keeps its number here, so that an earlier one cannot come back; it has no place here.
if attempt ~= ARGV[2] or state == 'moved' or lost then return {'STALE'} end
if state == 'running' then
  if worker == ARGV[3] and token == ARGV[4] then
    -- Our own begin, asked again because its answer was lost on the way.
    return run()
  end
  if redis.call('EXISTS', 'lease:' .. worker) == 1 then return {'BUSY'} end
  redis.call('SREM', 'running:' .. worker, ARGV[1])
end
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), ARGV[1])
local begun = 'begun:' .. string.sub(wait, 6)
if redis.call('HINCRBY', KEYS[1], 'deliveries', 1) > tonumber(ARGV[5]) then
  redis.call('HSET', KEYS[1], 'state', 'poison')
  redis.call('HDEL', KEYS[1], 'worker', 'token', 'begun')
  redis.call('ZREM', wait, ARGV[1])
  redis.call('ZREM', begun, ARGV[1])
  return {'POISON'}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'state', 'running', 'worker', ARGV[3], 'token', ARGV[4],
  'started', now, 'begun', begun)
redis.call('ZADD', begun, now, ARGV[1])
redis.call('HDEL', KEYS[1], 'progress')
redis.call('ZREM', wait, ARGV[1])
redis.call('SADD', 'running:' .. ARGV[3], ARGV[1])
-- In a store that was emptied it may die before it beats again; nobody would miss it.
redis.call('ZADD', 'workers', 'NX', time[1], ARGV[3])
return run()
