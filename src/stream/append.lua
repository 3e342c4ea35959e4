-- Appends entries and moves the cursor, both or neither.
--
-- KEYS: stream, cursor, relay, acked, lease, start, watch, trimmed (see janitor.lua for both).
-- ARGV: the cursor that we believe in ('' for none), the new cursor, the relay's name, our lease, the lease's life in
--       milliseconds, then type, data, seq for each entry.
-- Returns the stream's length.
--
-- A script and not MULTI/EXEC, because it can look before it writes: whether the lease is still ours, whether
-- the cursor is where we left it, and whether the stream is there. Where one of them is not so, Redis lost something
-- or somebody else reads the relay, and carrying on from memory would leave a hole under a clean cursor.
if redis.call('GET', KEYS[5]) ~= ARGV[4] then
    return redis.error_reply('LEASELOST another reader holds the lease, or Redis lost it')
end
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[1] then
    return redis.error_reply('CURSORMOVED the cursor is not where this reader left it')
end
if redis.call('EXISTS', KEYS[1]) == 0 then
    return redis.error_reply('STREAMGONE the stream does not exist')
end
local relay = redis.call('GET', KEYS[3])
local first = nil
-- The first write must be one that Redis refuses when its memory is full: it lets a script that has written anything
-- finish.
for i = 6, #ARGV, 3 do
    local id = redis.call('XADD', KEYS[1], '*', 'type', ARGV[i], 'data', ARGV[i + 1], 'seq', ARGV[i + 2])
    first = first or id
end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[3], ARGV[3])
local function stream()
    local info = {}
    local list = redis.call('XINFO', 'STREAM', KEYS[1])
    for i = 1, #list, 2 do
        info[list[i]] = list[i + 1]
    end
    return info
end
-- Where to go back to for all of these: some relays send what comes after the cursor, others the event itself, too.
local lowest = first and string.format('%d', ARGV[8] - 1) or ARGV[2]
if relay and relay ~= ARGV[3] then
    -- What stands in the stream from before has another relay's numbers. Without an entry: any that comes now is behind the last.
    local ms, sequence = string.match(stream()['last-generated-id'], '^(%d+)-(%d+)$')
    redis.call('SET', KEYS[6], first or (ms .. '-' .. string.format('%d', sequence + 1)))
    redis.call('SET', KEYS[4], lowest)
end
if first then
    -- From here on the numbers are this relay's, and until the janitor knows better nothing of them is acknowledged.
    redis.call('SET', KEYS[6], first, 'NX')
    redis.call('SET', KEYS[4], lowest, 'NX')
    local appended = redis.call('HINCRBY', KEYS[7], 'appended', (#ARGV - 5) / 3)
    if redis.call('HEXISTS', KEYS[7], 'added') == 0 then
        -- The janitor compares with this at its first look: somebody may have trimmed before it.
        local info = stream()
        local added = info['entries-added'] or appended
        local removed = added - info['length'] - (tonumber(redis.call('GET', KEYS[8])) or 0)
        redis.call('HSET', KEYS[7], 'unacked', first, 'last', first, 'added', added, 'removed', removed, 'seen', appended)
    end
end
redis.call('PEXPIRE', KEYS[5], ARGV[5])
return redis.call('XLEN', KEYS[1])
