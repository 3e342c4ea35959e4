-- The entries that the others left pending have been replayed.
INSERT INTO standpipe.migrations (version, name) VALUES (-1, 'taken over') ON CONFLICT DO NOTHING
