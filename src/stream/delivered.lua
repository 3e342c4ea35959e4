-- The entries delivered to the consumers of a group, a page at a time.
--
-- KEYS: stream.  ARGV: group, after, until, count, whether to leave out pending entries before the first one that is
-- not pending, and the consumers whose pending entries are always left out. Returns the last id examined ('' at the
-- end), the number of entries examined, the entries, and for each of them 1 if it is pending.
local entries = redis.call('XRANGE', KEYS[1], '(' .. ARGV[2], ARGV[3], 'COUNT', ARGV[4])
if #entries == 0 then
    return {'', 0, {}, {}}
end
local ours = {}
for i = 6, #ARGV do
    ours[ARGV[i]] = true
end
local holder = {}
for _, p in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], entries[1][1], entries[#entries][1], #entries)) do
    holder[p[1]] = p[2]
end
local leave_out = ARGV[5] == '1'
local kept, pending = {}, {}
for _, entry in ipairs(entries) do
    local who = holder[entry[1]]
    if not who then
        leave_out = false
    end
    if not (who and (leave_out or ours[who])) then
        kept[#kept + 1] = entry
        pending[#pending + 1] = who and 1 or 0
    end
end
return {entries[#entries][1], #entries, kept, pending}
