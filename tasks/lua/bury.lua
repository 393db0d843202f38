-- A job is no longer the dead worker's: its row has been dealt with.
-- KEYS: job, running set of the worker
-- ARGV: id, worker
redis.call('SREM', KEYS[2], ARGV[1])
local record = redis.call('HMGET', KEYS[1], 'worker', 'begun')
if record[1] == ARGV[2] and record[2] then redis.call('ZREM', record[2], ARGV[1]) end
