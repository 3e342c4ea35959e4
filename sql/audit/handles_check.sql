-- The handles among these ($1) that more than one account shows.
SELECT k.key, count(*)::text || ' accounts', '1'
FROM unnest($1::text[]) AS k (key) JOIN users u ON u.handle = k.key
WHERE k.key <> 'handle.invalid'
GROUP BY k.key HAVING count(*) > 1
