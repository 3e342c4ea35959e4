-- Takes these accounts ($1) and their handles, in the order of standpipe.apply.
SELECT pg_advisory_xact_lock(hashtextextended(n.name, 0)) FROM (
    SELECT k.did COLLATE "C" AS name FROM unnest($1::text[]) AS k (did)
    UNION
    SELECT ('@' || a.handle) COLLATE "C" FROM standpipe.accounts a
    WHERE a.did = ANY ($1::text[]) AND a.handle IS NOT NULL
    ORDER BY 1
) n
