-- Version 4: read leases, see lease.rs.
ALTER TABLE kvs.writer ADD lease bigint CHECK (lease > 0);
COMMENT ON COLUMN kvs.writer.lease IS 'Milliseconds after its last word for which the writer answers reads at most; null where it does without a limit, as it knows of no standby';
