-- Appends entries and moves the cursor, atomically; also adds dead letters, counts of losses, and a gap.
--
-- KEYS: stream, cursor, relay, acked, lease, start, watch, trimmed (see janitor.lua for both), epoch, epochs, dead letters,
--       their size in bytes, their keys, their accounts, missed, gaps, heads (their number), unchecked, repairs,
--       handles, and the bucket of each account below.
-- ARGV: the cursor that we believe in ('' for none), the new cursor, the relay's name, our lease, the lease's life in
--       milliseconds, the epoch, the newest revision of these entries ('' for none), the dead letters' budget in bytes and
--       that of one account in letters, the number of entries; then type, data, seq for each entry; the number of dead
--       letters, and for each its account, its key, the number of its names and values, and these; the generation of
--       heads that begins here and the last lossy one, with a space between ('' if none begins); the most commits to check and repositories to repair; the number of accounts that something is now known about, and for
--       each its field and what is known; the number of accounts with a commit to check, and for each its DID and the
--       commit ('' for none any more); the number of repositories to repair, and for each its DID and the reason as JSON; the
--       number of accounts whose handle is to be looked up, and for each its DID and the position that asks for it; then
--       names and numbers of what is counted as missing; at the end, where there is one, the name `gap` and a gap as
--       JSON.
-- Returns how many entries of the stream cannot be trimmed yet, and the numbers of dead letters that were kept, that were already
-- known, and that there was no room for.
--
-- A script and not MULTI/EXEC, because it can check before it writes: whether the lease is still ours, whether
-- the cursor is where we left it, and whether the stream exists. If any of these fails, Redis lost something
-- or somebody else reads the relay, and continuing from memory would leave a hole below a valid cursor.
--
-- The hash `epoch` holds the epoch (`id`), our last entry (`last`), the newest revision that we ever appended (`rev`), the
-- highest cursor of the epoch (`high`), and the generation of heads with the last lossy one (see known.rs);
-- the list `epochs` holds, for each epoch, the entry from which it is in force and the newest revision before it.
if redis.call('GET', KEYS[5]) ~= ARGV[4] then
    return redis.error_reply('LEASELOST another reader holds the lease, or Redis lost it')
end
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[1] then
    return redis.error_reply('CURSORMOVED the cursor is not where this reader left it')
end
if redis.call('EXISTS', KEYS[1]) == 0 then
    return redis.error_reply('STREAMGONE the stream does not exist')
end
local relay, epoch = redis.call('GET', KEYS[3]), redis.call('HGET', KEYS[9], 'id')
local began = epoch ~= ARGV[6]
local count = tonumber(ARGV[10])
local first, last = nil, nil
-- An epoch is a time, and its entries must not be older, even if the clock was set back.
local id = '*'
if began then
    local time = redis.call('TIME')
    if time[1] * 1000 + math.floor(time[2] / 1000) < tonumber(ARGV[6]) then
        id = ARGV[6] .. '-0'
    end
end
-- The first write must be one that Redis refuses when its memory is full: once a script has written anything, Redis
-- lets it finish.
for i = 11, 10 + 3 * count, 3 do
    last = redis.call('XADD', KEYS[1], id, 'type', ARGV[i], 'data', ARGV[i + 1], 'seq', ARGV[i + 2])
    first, id = first or last, '*'
end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[3], ARGV[3])
if began or tonumber(redis.call('HGET', KEYS[9], 'high') or '0') < tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[9], 'high', ARGV[2])
end
local function stream()
    local info = {}
    local list = redis.call('XINFO', 'STREAM', KEYS[1])
    for i = 1, #list, 2 do
        info[list[i]] = list[i + 1]
    end
    return info
end
local function next_id()
    local ms, sequence = string.match(stream()['last-generated-id'], '^(%d+)-(%d+)$')
    return ms .. '-' .. string.format('%d', sequence + 1)
end
-- The position to go back to for all of these entries: some relays start after the cursor, others at it.
local lowest = first and string.format('%d', ARGV[13] - 1) or ARGV[2]
if (relay and relay ~= ARGV[3]) or (epoch and began) then
    -- Entries already in the stream have another numbering. If none is appended now, the next one will follow the last.
    redis.call('SET', KEYS[6], first or next_id())
    redis.call('SET', KEYS[4], lowest)
end
if began then
    redis.call('RPUSH', KEYS[10], string.format('%s %s %s', first or next_id(), ARGV[6],
        redis.call('HGET', KEYS[9], 'rev') or ''))
    redis.call('LTRIM', KEYS[10], -1000, -1)
    redis.call('HSET', KEYS[9], 'id', ARGV[6])
end
if first then
    -- From here on, the numbers are this relay's, and none counts as acknowledged until the janitor finds otherwise.
    redis.call('SET', KEYS[6], first, 'NX')
    redis.call('SET', KEYS[4], lowest, 'NX')
    redis.call('HSET', KEYS[9], 'last', last)
    local newest = redis.call('HGET', KEYS[9], 'rev')
    if ARGV[7] ~= '' and (not newest or newest < ARGV[7]) then
        redis.call('HSET', KEYS[9], 'rev', ARGV[7])
    end
    local appended = redis.call('HINCRBY', KEYS[7], 'appended', count)
    if redis.call('HEXISTS', KEYS[7], 'added') == 0 then
        -- The janitor's first call compares with this, because somebody may trim before that.
        local info = stream()
        local added = info['entries-added'] or appended
        local removed = added - info['length'] - (tonumber(redis.call('GET', KEYS[8])) or 0)
        redis.call('HSET', KEYS[7], 'unacked', first, 'last', first, 'added', added, 'removed', removed, 'seen', appended)
    end
end

-- Dead letters. They are small, and each is kept once, however often its frame arrives. If there is no room for one,
-- that is counted and holds nobody up: one bad account must not stop all others.
local kept, known, refused = 0, 0, 0
local at = 11 + 3 * count
local letters = tonumber(ARGV[at])
at = at + 1
for _ = 1, letters do
    local account, key, fields = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
    -- As replace_dead_letter.lua counts it.
    local size = 0
    for i = at + 3, at + 2 + fields do
        size = size + #ARGV[i]
    end
    local letter = redis.call('HGET', KEYS[13], key)
    if letter and #redis.call('XRANGE', KEYS[11], letter, letter) > 0 then
        known = known + 1
    elseif tonumber(redis.call('HGET', KEYS[14], account) or '0') >= tonumber(ARGV[9])
            or tonumber(redis.call('GET', KEYS[12]) or '0') + size > tonumber(ARGV[8]) then
        refused = refused + 1
    else
        local source = first or stream()['last-generated-id']
        size = size + #'source_id' + #source + #'key' + #key + #'account' + #account
        letter = redis.call('XADD', KEYS[11], '*', 'source_id', source, 'key', key, 'account', account,
            unpack(ARGV, at + 3, at + 2 + fields))
        redis.call('HSET', KEYS[13], key, letter)
        redis.call('HINCRBY', KEYS[14], account, 1)
        redis.call('INCRBY', KEYS[12], size)
        kept = kept + 1
    end
    at = at + 3 + fields
end

-- What verification remembers; see accounts.rs.
if ARGV[at] ~= '' then
    local current, lossy = string.match(ARGV[at], '^(%d+) (%d+)$')
    redis.call('HSET', KEYS[9], 'generation', current, 'lossy', lossy)
end
local most = tonumber(ARGV[at + 1])
local accounts = tonumber(ARGV[at + 2])
at = at + 3
local new = 0
for i = 1, accounts do
    new = new + redis.call('HSET', KEYS[20 + i], ARGV[at], ARGV[at + 1])
    at = at + 2
end
if new > 0 then
    redis.call('INCRBY', KEYS[17], new)
end
local function remember(hash, command)
    local number = tonumber(ARGV[at])
    at = at + 1
    for _ = 1, number do
        if ARGV[at + 1] == '' then
            redis.call('HDEL', hash, ARGV[at])
        elseif redis.call('HEXISTS', hash, ARGV[at]) == 1 or redis.call('HLEN', hash) < most then
            redis.call(command, hash, ARGV[at], ARGV[at + 1])
        else
            refused = refused + 1
        end
        at = at + 2
    end
end
remember(KEYS[18], 'HSET')
remember(KEYS[19], 'HSET')
remember(KEYS[20], 'HSET')

for i = at, #ARGV, 2 do
    if ARGV[i] == 'gap' then
        redis.call('HINCRBY', KEYS[15], 'gap', 1)
        redis.call('LPUSH', KEYS[16], ARGV[i + 1])
        redis.call('LTRIM', KEYS[16], 0, 99)
    else
        redis.call('HINCRBY', KEYS[15], ARGV[i], ARGV[i + 1])
    end
end
if refused > 0 then
    redis.call('HINCRBY', KEYS[15], 'no_room', refused)
end
redis.call('PEXPIRE', KEYS[5], ARGV[5])
local acknowledged = tonumber(redis.call('HGET', KEYS[7], 'acknowledged') or '0')
return {math.max(0, redis.call('XLEN', KEYS[1]) - acknowledged), kept, known, refused}
