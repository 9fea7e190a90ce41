-- Version 3: incarnations, see incarnations.rs.
CREATE TABLE kvs.incarnations (
    id uuid PRIMARY KEY,
    parent uuid NOT NULL,
    fork bigint NOT NULL,
    first bigint NOT NULL UNIQUE,
    cause text NOT NULL,
    time timestamptz NOT NULL DEFAULT now(),
    CHECK (first > fork)
);
COMMENT ON TABLE kvs.incarnations IS 'Where the log was continued from a copy of itself, or without a lost tail: first follows on fork, and no entry is between';
CREATE TABLE kvs.identity (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    log uuid,
    system bigint,
    database bigint,
    relation bigint,
    timeline bigint,
    durable boolean
);
COMMENT ON TABLE kvs.identity IS 'Where the newest writer found the log, by which a copy is recognized, and whether its commits survive a power cut; null where it is not known';
INSERT INTO kvs.identity DEFAULT VALUES;
-- A standby of an older version, which knows nothing of incarnations, cannot take the log over any more.
ALTER TABLE kvs.writer ADD taken bigint;
COMMENT ON COLUMN kvs.writer.taken IS 'The epoch, once a version that knows incarnations has taken it';
ALTER TABLE kvs.writer ADD CONSTRAINT taken_over_by_a_newer_kvs CHECK (taken = epoch);
