-- Appends the entries of one request, unless the same request was accepted before.
--
-- KEYS: stream, watch, epoch, what the request of this name got (the stream again if it has no name), the accounts that
--       others feed.
-- ARGV: the length at which there is no room, what tells this request from another one of the same name, for how many
--       seconds its name is remembered, the number of accounts, and each; then type and data of each entry.
-- Returns a word and the entries' ids: `new`, `known` (it was accepted before), `other` (another request had this name),
-- `full` (there is no room) or `none` (there is no stream).
local named = KEYS[4] ~= KEYS[1]
if named then
    local known = redis.call('GET', KEYS[4])
    if known then
        local print, ids = string.match(known, '^(%S+) (.*)$')
        if print ~= ARGV[2] then
            return {'other'}
        end
        local answer = {'known'}
        for id in string.gmatch(ids, '%S+') do
            answer[#answer + 1] = id
        end
        return answer
    end
end
if redis.call('EXISTS', KEYS[1]) == 0 then
    return {'none'}
end
local kept = tonumber(redis.call('HGET', KEYS[2], 'kept') or '0')
if redis.call('XLEN', KEYS[1]) - kept >= tonumber(ARGV[1]) then
    return {'full'}
end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
local before
for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
        before = info[i + 1]
    end
end
local accounts = tonumber(ARGV[4])
local ids = {}
-- The first write must be one that Redis refuses when its memory is full. No number: that is the relay's alone.
for i = 5 + accounts, #ARGV, 2 do
    ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', 'type', ARGV[i], 'data', ARGV[i + 1], 'seq', '')
end
for i = 5, 4 + accounts do
    redis.call('HSET', KEYS[5], ARGV[i], 1)
end
if named then
    redis.call('SET', KEYS[4], ARGV[2] .. ' ' .. table.concat(ids, ' '), 'EX', ARGV[3])
end
-- They are ours, not another program's: see open.lua and janitor.lua.
if redis.call('HGET', KEYS[3], 'last') == before then
    redis.call('HSET', KEYS[3], 'last', ids[#ids])
end
if redis.call('HEXISTS', KEYS[2], 'appended') == 1 then
    redis.call('HINCRBY', KEYS[2], 'appended', #ids)
end
table.insert(ids, 1, 'new')
return ids
