-- No script of its own: stands before those that count what a worker did (tasks/reliability.py).
-- The counts fade by halves; the half-life comes in seconds. After eight of them nothing is left worth keeping.
local function count(key, good, faults, half_life)
  local time = redis.call('TIME')
  local now = time[1] + time[2] / 1000000
  local held = redis.call('HMGET', key, 'good', 'faults', 'at')
  local share = 0.5 ^ (math.max(now - tonumber(held[3] or now), 0) / half_life)
  redis.call('HSET', key,
    'good', string.format('%.9g', tonumber(held[1] or 0) * share + good),
    'faults', string.format('%.9g', tonumber(held[2] or 0) * share + faults),
    'at', string.format('%.3f', now))
  redis.call('EXPIRE', key, math.ceil(8 * half_life))
end
