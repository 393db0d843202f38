-- A worker renews its one lease, and hears what became of the jobs it runs.
-- KEYS: lease, workers, running set of the worker
-- ARGV: worker, lease in ms, card, then the ids it runs
-- Returns {cancelled ids, ids it no longer holds, ids the record says it runs but it did not name}
local time = redis.call('TIME')
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
redis.call('ZADD', KEYS[2], time[1], ARGV[1])
local cancelled, lost, ghosts, named = {}, {}, {}, {}
for i = 4, #ARGV do
  named[ARGV[i]] = true
  local record = redis.call('HMGET', 'job:' .. ARGV[i], 'state', 'worker', 'cancel')
  if record[1] and not (record[1] == 'running' and record[2] == ARGV[1]) then
    lost[#lost + 1] = ARGV[i]
  elseif record[3] then
    cancelled[#cancelled + 1] = ARGV[i]
  end
end
for _, id in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  if not named[id] then ghosts[#ghosts + 1] = id end
end
return {cancelled, lost, ghosts}
