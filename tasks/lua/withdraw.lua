-- Drop what jobs left behind that have moved to another region: their older attempts count no more here.
-- ARGV: seconds to remember them, then id and present attempt of each
-- An outcome is left for its row to judge: the first one stands, wherever it came from.
for i = 2, #ARGV, 2 do
  local id, present = ARGV[i], ARGV[i + 1]
  local job = 'job:' .. id
  local record = redis.call('HMGET', job, 'state', 'attempt', 'worker', 'wait', 'begun')
  local state, worker, wait, begun = record[1], record[3], record[4], record[5]
  if state and state ~= 'ended' and tonumber(record[2] or '0') < tonumber(present) then
    if wait then redis.call('ZREM', wait, id) end
    if begun then redis.call('ZREM', begun, id) end
    -- Whoever still runs it hears at its next beat that it is no longer his.
    if worker then redis.call('SREM', 'running:' .. worker, id) end
    redis.call('HDEL', job, 'params', 'ticket', 'worker', 'token', 'started', 'progress', 'wait', 'score', 'begun')
    redis.call('HSET', job, 'state', 'moved', 'attempt', present)
    redis.call('EXPIRE', job, ARGV[1])
    -- Sync waiters look at the row and follow.
    redis.call('RPUSH', 'done:' .. id, '')
    redis.call('EXPIRE', 'done:' .. id, 60)
    hush(id, nil, 0, 60)
  end
end
