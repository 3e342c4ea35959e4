-- Sends the reader back for events that PostgreSQL has lost.
--
-- KEYS: noted, cursor, acked, relay, watch (see janitor.lua), missed, gaps, epoch (see append.lua).
-- ARGV: when PostgreSQL noted something last and which server that was, as the caller read it here; the position to go back
--       to; when PostgreSQL says that it noted something last, which server it is now; now, in milliseconds; a gap as JSON,
--       or ''.
-- Returns 1, or 0 if another process was faster.
--
-- The janitor does the rest: it sets the cursor back to `acked`, and does not touch `acked` until the group has passed
-- all entries now in the stream.
if (redis.call('HGET', KEYS[1], 'ms') or '0') ~= ARGV[1] or (redis.call('HGET', KEYS[1], 'server') or '') ~= ARGV[2] then
    return 0
end
redis.call('HSET', KEYS[1], 'ms', ARGV[4], 'server', ARGV[5])
local cursor = redis.call('GET', KEYS[2])
if cursor and redis.call('EXISTS', KEYS[4]) == 1 then
    -- A refill already in progress keeps its end.
    redis.call('HSETNX', KEYS[1], 'refill_until', cursor)
    redis.call('HSET', KEYS[1], 'refill_from', ARGV[3], 'refill_ms', ARGV[6])
    -- Never forward: events before `from` may be unacknowledged again, because others had removed them.
    local acked = tonumber(redis.call('GET', KEYS[3]) or '')
    if not acked or acked > tonumber(ARGV[3]) then
        redis.call('SET', KEYS[3], ARGV[3])
    end
    redis.call('HSET', KEYS[5], 'due', 1)
    -- What was repaired since is lost as well, and what is read again does not ask for it: every account known by now is
    -- compared.
    redis.call('HSET', KEYS[8], 'lossy', redis.call('HINCRBY', KEYS[8], 'generation', 1))
    redis.call('HDEL', KEYS[5], 'back_ms', 'pause', 'back_to')
end
if ARGV[7] ~= '' then
    redis.call('HINCRBY', KEYS[6], 'gap', 1)
    redis.call('LPUSH', KEYS[7], ARGV[7])
    redis.call('LTRIM', KEYS[7], 0, 99)
end
return 1
