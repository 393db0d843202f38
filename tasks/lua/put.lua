-- Enter one attempt of a job as queued, unless the record already knows better.
-- KEYS: job, wait index, sequence, epoch, queues
-- ARGV: id, attempt, rank (9 - priority), params, timeout in seconds, a fresh epoch, queue, its model or '',
--       the attempt's ticket, then the queues beside it
-- Returns {state, epoch, its standing or {}}
local epoch = redis.call('GET', KEYS[4])
if not epoch then
  epoch = ARGV[6]
  redis.call('SET', KEYS[4], epoch)
end
local record = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'worker', 'cancel', 'score', 'wait', 'begun')
local state, attempt, worker, cancel, score, wait, begun =
  record[1], tonumber(record[2] or '0'), record[3], record[4], record[5], record[6], record[7]
if cancel then return {'cancelled', epoch, {}} end
-- An outcome is an outcome, whichever attempt it is of: the row takes it, and nothing has to run again. Where it has been
-- handed on and forgotten, a later attempt is of a row that an older backup brought back.
local again = state == 'ended' and tonumber(ARGV[2]) > attempt and redis.call('HEXISTS', KEYS[1], 'outcome') == 0
if state == 'ended' and not again then return {'ended', epoch, {}} end
if state and (attempt > tonumber(ARGV[2]) or (attempt == tonumber(ARGV[2]) and state ~= 'queued')) then
  return {state, epoch, {}}
end
if worker then
  redis.call('SREM', 'running:' .. worker, ARGV[1])
  redis.call('HDEL', KEYS[1], 'worker', 'token', 'started', 'progress')
end
if begun then
  redis.call('ZREM', begun, ARGV[1])
  redis.call('HDEL', KEYS[1], 'begun')
end
-- It comes from another region of this store.
if wait and wait ~= KEYS[2] then redis.call('ZREM', wait, ARGV[1]) end
-- It comes back: nobody needs to be told any more that it left.
if state == 'moved' or again then redis.call('DEL', 'done:' .. ARGV[1]) end
if not score then
  -- Priority first, then the order of arrival; both exact in a double: 10 * 2^48 < 2^53.
  score = string.format('%.0f', tonumber(ARGV[3]) * 281474976710656 + redis.call('INCR', KEYS[3]))
end
redis.call('HSET', KEYS[1], 'state', 'queued', 'attempt', ARGV[2], 'params', ARGV[4], 'timeout_s', ARGV[5],
  'wait', KEYS[2], 'score', score, 'ticket', ARGV[9])
redis.call('HDEL', KEYS[1], 'lost')
redis.call('PERSIST', KEYS[1])
redis.call('HSET', KEYS[5], ARGV[7], ARGV[8])
redis.call('ZADD', KEYS[2], score, ARGV[1])
return {'queued', epoch, standing(KEYS[2], ARGV[1], score, {unpack(ARGV, 10)})}
