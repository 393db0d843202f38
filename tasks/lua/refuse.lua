-- An outcome without a good ticket: no worker of ours wrote it. Drop it, and everything that stands on it.
-- KEYS: job, list that waiters block on, Celery's result, wait index, index of the jobs that run, running set
-- ARGV: id, the outcome as it was found
-- Returns 1 if the record held it and is gone, 0 if only a waiter was told of it
redis.call('INCR', 'forged')
redis.call('DEL', KEYS[2])
if redis.call('HGET', KEYS[1], 'outcome') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1], KEYS[3])
-- The row's own places, not those that the record names: whoever wrote the one wrote the other.
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('SREM', KEYS[6], ARGV[1])
return 1
