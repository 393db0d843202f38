-- A worker enters a job that its client brought, and begins it with that; an id is taken once.
-- KEYS: job, sequence, news, running set of the worker, index of the jobs that run
-- ARGV: id, worker, timeout in seconds, what its row will say
-- Returns when it began in unix milliseconds, 0 if the id was used before
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local time = redis.call('TIME')
local started = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'state', 'running', 'attempt', 1, 'worker', ARGV[2], 'timeout_s', ARGV[3],
  'direct', ARGV[4], 'started', started, 'begun', KEYS[5])
redis.call('ZADD', KEYS[5], started, ARGV[1])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), ARGV[1])
redis.call('SADD', KEYS[4], ARGV[1])
-- As in begin.lua.
redis.call('ZADD', 'workers', 'NX', time[1], ARGV[2])
return started
