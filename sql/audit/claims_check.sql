-- Of these accounts ($1) those that do not show the handle that was claimed last for them, or show one of which
-- another account is the newest claimant.
SELECT k.key, u.handle::text, e.handle
FROM unnest($1::text[]) AS k (key)
JOIN standpipe.accounts a ON a.did = k.key
JOIN users u ON u.did = k.key
CROSS JOIN LATERAL (SELECT CASE
    WHEN (SELECT h.did FROM standpipe.handles h WHERE h.handle = a.handle) = a.did THEN a.handle
    ELSE 'handle.invalid'
END) e (handle)
WHERE a.handle IS NOT NULL AND u.handle <> e.handle
