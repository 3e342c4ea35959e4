-- Makes epochs known before an event names them.
INSERT INTO standpipe.epochs SELECT unnest($1::bigint[]) ON CONFLICT DO NOTHING
