-- A worker shows what the jobs that it runs say: how far they have come, and the next entry of their streams.
-- ARGV: worker, most entries of a stream, seconds to keep it, then of each job: id, attempt, progress or '',
--       entry's number, entry or ''
for i = 4, #ARGV, 5 do
  local id, attempt = ARGV[i], ARGV[i + 1]
  local record = redis.call('HMGET', 'job:' .. id, 'state', 'attempt', 'worker', 'started')
  if record[1] == 'running' and record[2] == attempt and record[3] == ARGV[1] then
    if ARGV[i + 2] ~= '' then redis.call('HSET', 'job:' .. id, 'progress', ARGV[i + 2]) end
    if ARGV[i + 4] ~= '' then say(id, record[4], attempt, ARGV[i + 3], ARGV[i + 4], ARGV[2], ARGV[3]) end
  end
end
