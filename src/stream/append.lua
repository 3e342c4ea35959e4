-- Appends entries and moves the cursor, both or neither.
--
-- KEYS: stream, cursor, relay, acked, lease.
-- ARGV: the cursor that we believe in ('' for none), the new cursor ('' to leave it), the relay's name, our lease,
--       the lease's life in milliseconds, then type, data, seq for each entry.
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
-- The first write must be one that Redis refuses when its memory is full: it lets a script that has written anything
-- finish.
for i = 6, #ARGV, 3 do
    redis.call('XADD', KEYS[1], '*', 'type', ARGV[i], 'data', ARGV[i + 1], 'seq', ARGV[i + 2])
end
if ARGV[2] ~= '' then
    redis.call('SET', KEYS[2], ARGV[2])
    redis.call('SET', KEYS[3], ARGV[3])
    -- Until the janitor knows better, nothing from here on is acknowledged.
    if #ARGV >= 8 then
        redis.call('SET', KEYS[4], ARGV[8], 'NX')
    end
end
redis.call('PEXPIRE', KEYS[5], ARGV[5])
return redis.call('XLEN', KEYS[1])
