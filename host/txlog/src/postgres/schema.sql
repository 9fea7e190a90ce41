-- Version 1 of the schema. It is never changed, only followed by the migrations in schema.rs: version 2 has no index of its
-- own, version 3 has the tables of incarnations.sql beside, version 4 the column of lease.sql;
-- version 5 changes no table.
CREATE TABLE kvs.transactions (
    sequence bigint PRIMARY KEY,
    time bigint NOT NULL,
    event_type smallint NOT NULL CHECK (event_type IN (1, 2)),
    key bytea NOT NULL,
    value bytea,
    metadata json,
    expires bigint,
    CHECK ((event_type = 2) = (value IS NOT NULL))
);
COMMENT ON TABLE kvs.transactions IS 'The log: 1 deletes a key, 2 puts it. Times are milliseconds since 1970. Read a key with convert_from(key, ''UTF8'')';
-- Compaction asks whether a key is written again.
CREATE INDEX transactions_key ON kvs.transactions (substr(sha256(key), 1, 16), sequence);
CREATE TABLE kvs.writer (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL,
    holder text,
    seen timestamptz NOT NULL,
    last bigint NOT NULL,
    forgotten bigint NOT NULL,
    compacted bigint NOT NULL
) WITH (fillfactor = 10);
COMMENT ON TABLE kvs.writer IS 'Who writes the log: only the holder of the newest epoch, and only what follows on last';
INSERT INTO kvs.writer (epoch, seen, last, forgotten, compacted) VALUES (0, 'epoch', 0, 0, 0);
