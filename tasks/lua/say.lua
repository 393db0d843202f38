-- Append one numbered entry to the stream of what a job says; one that is there already is not added again.
-- A run's entries carry the moment it began, so that those of a later run come after them.
local function say(id, started, attempt, number, text, most, seconds)
  local stream, entry = 'events:' .. id, started .. '-' .. number
  local added = redis.pcall('XADD', stream, 'MAXLEN', '~', most, entry, 'attempt', attempt, 'said', text)
  if type(added) == 'table' and added.err and number == '1' then
    local last = redis.pcall('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
    if last and tonumber(string.match(last[1], '^%d+')) > tonumber(started) then
      -- The store's clock went back: the run before began later than this one.
      redis.call('DEL', stream)
      redis.call('XADD', stream, entry, 'attempt', attempt, 'said', text)
    end
  end
  redis.call('EXPIRE', stream, seconds)
end

-- Wake whoever follows a job to look at its record, after the last entry of the run that began at `started`, or of all.
local function hush(id, started, attempt, seconds)
  local stream = 'events:' .. id
  redis.pcall('XADD', stream, started and started .. '-18446744073709551615' or '*', 'attempt', attempt)
  redis.call('EXPIRE', stream, seconds)
end
