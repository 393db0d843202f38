-- Mark a job as unwanted, whatever state it is in, and wake whoever runs it or waits for it.
-- KEYS: job, list that waiters block on
-- ARGV: id, seconds to remember it
-- Returns the state it was in: queued, running, ended, or '' where there was no record
local record = redis.call('HMGET', KEYS[1], 'state', 'worker', 'wait')
local state = record[1] or ''
redis.call('HSET', KEYS[1], 'cancel', 1)
if state == 'running' then
  redis.call('PUBLISH', 'ctl:' .. record[2], ARGV[1])
elseif state ~= 'ended' then
  -- The mark stays a while, so that a slower submit cannot enter the job after its cancel.
  redis.call('HSET', KEYS[1], 'state', 'cancelled')
  redis.call('HDEL', KEYS[1], 'params', 'ticket')
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  if record[3] then redis.call('ZREM', record[3], ARGV[1]) end
end
redis.call('RPUSH', KEYS[2], '')
redis.call('EXPIRE', KEYS[2], 60)
if state ~= 'ended' then hush(ARGV[1], nil, 0, 60) end
return state
