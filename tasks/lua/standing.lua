-- No script of its own: stands before those that tell a job's standing.
-- Returns {jobs before it in its queue, in the queues beside, jobs of its queue that run, of the queues beside}
local function standing(wait, id, score, beside)
  local before, running = 0, 0
  for _, queue in ipairs(beside) do
    before = before + redis.call('ZCOUNT', 'wait:' .. queue, '-inf', '(' .. score)
    running = running + redis.call('ZCARD', 'begun:' .. queue)
  end
  return {redis.call('ZRANK', wait, id), before, redis.call('ZCARD', 'begun:' .. string.sub(wait, 6)), running}
end
