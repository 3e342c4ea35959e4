-- Trims what every group has acknowledged, notes the lowest position that our group has not, and reports.
--
-- KEYS: stream, cursor, acked, start.  ARGV: our group, how many entries to trim at the most; 0 to look and change nothing.
-- Returns {length, own group exists, pending, lag or -1, oldest pending id, oldest undelivered id, trimmed,
--          the group that holds the trim back}, or {} without a stream.
--
-- One script: reading pending entries before the groups, with a delivery in between, once deleted entries that
-- were pending. Never trims while our own group is missing: then nothing is known to be acknowledged.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return {}
end

local function parts(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(seq)
end
local function before(a, b)
    local a_ms, a_seq = parts(a)
    local b_ms, b_seq = parts(b)
    return a_ms < b_ms or (a_ms == b_ms and a_seq < b_seq)
end
local function seq_of(entry)
    local fields = entry[2]
    for i = 1, #fields, 2 do
        if fields[i] == 'seq' then
            return fields[i + 1]
        end
    end
    return ''
end

local own, floor, holder = false, nil, ''
local pending, lag, oldest_pending, oldest_waiting = 0, -1, '', ''
for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for i = 1, #info, 2 do
        group[info[i]] = info[i + 1]
    end
    local low = group['last-delivered-id']
    local first = ''
    if group['pending'] > 0 then
        first = redis.call('XPENDING', KEYS[1], group['name'])[2]
        if before(first, low) then
            low = first
        end
    end
    if floor == nil or before(low, floor) then
        floor, holder = low, group['name']
    end
    if group['name'] == ARGV[1] then
        own = true
        pending, oldest_pending = group['pending'], first
        if group['lag'] then
            lag = group['lag']
        end
        local waiting = redis.call('XRANGE', KEYS[1], '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
        if waiting then
            oldest_waiting = waiting[1]
        end
        local unacked = waiting
        if first ~= '' then
            unacked = redis.call('XRANGE', KEYS[1], first, '+', 'COUNT', 1)[1] or waiting
        end
        -- Entries from before a change of relay have another relay's numbers; of the present one nothing is
        -- acknowledged while they are not.
        local start = redis.call('GET', KEYS[4])
        if unacked and start and before(unacked[1], start) then
            unacked = redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', 1)[1]
        end
        local position = redis.call('GET', KEYS[2])
        if unacked then
            position = seq_of(unacked)
        end
        if position and position ~= '' and ARGV[2] ~= '0' then
            redis.pcall('SET', KEYS[3], position)
        end
    end
end

local trimmed = 0
if own and ARGV[2] ~= '0' then
    trimmed = redis.call('XTRIM', KEYS[1], 'MINID', '~', floor, 'LIMIT', ARGV[2])
end
return {redis.call('XLEN', KEYS[1]), own and 1 or 0, pending, lag, oldest_pending, oldest_waiting, trimmed, holder}
