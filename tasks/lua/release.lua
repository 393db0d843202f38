-- A worker gives an attempt back: queued again in its old place, and not counted as a delivery.
-- KEYS: job, sequence, news, running set of the worker
-- ARGV: id, attempt, worker
-- Returns 1 if it was ours to give
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'worker', 'wait', 'score', 'begun')
redis.call('SREM', KEYS[4], ARGV[1])
if not (record[1] == 'running' and record[2] == ARGV[2] and record[3] == ARGV[3]) then return 0 end
if record[6] then redis.call('ZREM', record[6], ARGV[1]) end
if redis.call('HEXISTS', KEYS[1], 'direct') == 1 then
  -- Its client brought it to this worker, and nobody else has its params: it ends here.
  redis.call('HSET', KEYS[1], 'state', 'abandoned')
  redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), ARGV[1])
  return 1
end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('HDEL', KEYS[1], 'worker', 'token', 'started', 'progress', 'begun')
redis.call('HINCRBY', KEYS[1], 'deliveries', -1)
redis.call('ZADD', record[4], record[5], ARGV[1])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), ARGV[1])
return 1
