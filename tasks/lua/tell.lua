-- A worker shows how far the jobs that it runs have come.
-- ARGV: worker, then id and progress of each job
for i = 2, #ARGV, 2 do
  local record = redis.call('HMGET', 'job:' .. ARGV[i], 'state', 'worker')
  if record[1] == 'running' and record[2] == ARGV[1] then
    redis.call('HSET', 'job:' .. ARGV[i], 'progress', ARGV[i + 1])
  end
end
