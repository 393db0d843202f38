-- Where a job stands among all that wait for the same workers.
-- KEYS: wait index
-- ARGV: id, then the queues beside its own
-- Returns {} if it does not wait there, else its standing
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not score then return {} end
return standing(KEYS[1], ARGV[1], string.format('%.0f', score), {unpack(ARGV, 2)})
