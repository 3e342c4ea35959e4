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
if not has_room(KEYS[1], KEYS[2], ARGV[1]) then
    return {'full'}
end
local first = 5 + tonumber(ARGV[4])
local entries = {}
for i = first, #ARGV, 2 do
    entries[#entries + 1] = {ARGV[i], ARGV[i + 1]}
end
-- No number: that is the relay's alone.
local ids = append(KEYS[1], KEYS[2], KEYS[3], entries, '')
for i = 5, first - 1 do
    redis.call('HSET', KEYS[5], ARGV[i], 1)
end
if named then
    redis.call('SET', KEYS[4], ARGV[2] .. ' ' .. table.concat(ids, ' '), 'EX', ARGV[3])
end
table.insert(ids, 1, 'new')
return ids
