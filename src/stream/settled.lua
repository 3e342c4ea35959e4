-- Reads entries that the group has acknowledged: those before the first one that it has not.
--
-- KEYS: stream, refused (what ended as dead letters, by entry; see dead_letter.lua).
-- ARGV: group, the id after which to begin ('' for the last one that is settled), an entry that must still be there ('' for
--       none), the maximum number of entries.
-- Returns whether that entry is still there, the last one that is settled (0-0 if there is none, '' if it is not needed), the
-- entries, and for each what of it ended as dead letters ('' for nothing).
if ARGV[3] ~= '' and #redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3]) == 0 then
    return {0, '', {}, {}}
end
local until_ = nil
if redis.call('EXISTS', KEYS[1]) == 1 then
    for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
        local group = {}
        for i = 1, #info, 2 do
            group[info[i]] = info[i + 1]
        end
        if group['name'] == ARGV[1] then
            until_ = group['last-delivered-id']
            if group['pending'] > 0 then
                until_ = '(' .. redis.call('XPENDING', KEYS[1], ARGV[1])[2]
            end
        end
    end
end
if not until_ then
    -- Until the group is there again, nothing is known to be settled.
    return {1, '', {}, {}}
end
local after, entries, refused = ARGV[2], {}, {}
local function is_before(one, other)
    local ms, seq = string.match(one, '^(%d+)-(%d+)$')
    local other_ms, other_seq = string.match(other, '(%d+)-(%d+)$')
    return tonumber(ms) < tonumber(other_ms) or (ms == other_ms and tonumber(seq) < tonumber(other_seq))
end
if after ~= '' and is_before(after, until_) then
    entries = redis.call('XRANGE', KEYS[1], '(' .. after, until_, 'COUNT', ARGV[4])
end
if #entries == 0 and ARGV[3] == '' then
    local last = redis.call('XREVRANGE', KEYS[1], until_, '-', 'COUNT', 1)[1]
    return {1, last and last[1] or '0-0', {}, {}}
end
if #entries > 0 and redis.call('EXISTS', KEYS[2]) == 1 then
    for i, entry in ipairs(entries) do
        refused[i] = redis.call('HGET', KEYS[2], entry[1]) or ''
    end
end
return {1, '', entries, refused}
