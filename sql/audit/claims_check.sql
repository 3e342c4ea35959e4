-- The accounts among these ($1) that do not show the handle most recently claimed for them, or show one whose newest
-- claimant is another account.
SELECT k.key, u.handle::text, e.handle
FROM unnest($1::text[]) AS k (key)
JOIN standpipe.accounts a ON a.did = k.key
JOIN users u ON u.did = k.key
CROSS JOIN LATERAL (SELECT CASE
    WHEN (SELECT h.did FROM standpipe.handles h WHERE h.handle = a.handle) = a.did THEN a.handle
    ELSE 'handle.invalid'
END) e (handle)
WHERE a.handle IS NOT NULL AND u.handle <> e.handle
