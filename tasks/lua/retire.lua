-- A worker ends its lease. What it still holds is taken over at once; if it goes as it was told to, it is not missed.
-- KEYS: lease, ended, cards, names
-- ARGV: worker, name, 1 if it goes as it was told to
redis.call('DEL', KEYS[1])
redis.call('SADD', KEYS[2], ARGV[1])
if ARGV[3] == '1' then
  redis.call('HDEL', KEYS[3], ARGV[1])
  if redis.call('HGET', KEYS[4], ARGV[2]) == ARGV[1] then redis.call('HDEL', KEYS[4], ARGV[2]) end
end
