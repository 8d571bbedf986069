CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE hosts (
    id TEXT PRIMARY KEY,
    cell INTEGER NOT NULL,
    -- PhysicalHost as last heard, JSON; empty when never heard
    description TEXT NOT NULL
) STRICT;

CREATE TABLE groups (
    path TEXT PRIMARY KEY,
    members TEXT NOT NULL,
    version INTEGER NOT NULL
) STRICT;

CREATE TABLE images (
    digest TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    revision INTEGER NOT NULL,
    -- format, sizes, boot files, JSON
    facts TEXT NOT NULL,
    UNIQUE (name, revision)
) STRICT;

CREATE TABLE templates (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL REFERENCES images (digest),
    facts TEXT NOT NULL
) STRICT;

CREATE TABLE vms (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    host TEXT NOT NULL,
    template TEXT NOT NULL,
    -- TemplateSpec it is made from, JSON
    spec TEXT NOT NULL,
    standing TEXT NOT NULL,
    -- the command that makes or deletes it
    command TEXT NOT NULL,
    created_at_us INTEGER NOT NULL,
    version INTEGER NOT NULL
) STRICT;

CREATE TABLE commands (
    -- UUID version 7: the order of the text is the order of issue
    id TEXT PRIMARY KEY,
    body TEXT NOT NULL,
    -- cells, JSON
    published TEXT NOT NULL DEFAULT '[]',
    -- 0: open
    ended_at_us INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX commands_open ON commands (ended_at_us);

CREATE TABLE verdicts (
    command TEXT NOT NULL REFERENCES commands (id) ON DELETE CASCADE,
    -- position in the frozen list
    member INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (command, member)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    -- empty: the controller itself
    host TEXT NOT NULL,
    vm TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    counter INTEGER NOT NULL,
    occurred_at_us INTEGER NOT NULL,
    received_at_us INTEGER NOT NULL,
    severity TEXT NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL,
    from_state INTEGER NOT NULL,
    to_state INTEGER NOT NULL,
    command TEXT NOT NULL
) STRICT;
-- an agent's event that comes twice is one
CREATE UNIQUE INDEX events_once ON events (host, incarnation, counter) WHERE host <> '' AND incarnation <> '';
CREATE INDEX events_host ON events (host, sequence);
CREATE INDEX events_vm ON events (vm, sequence);

CREATE TABLE usage (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    minute_us INTEGER NOT NULL,
    host TEXT NOT NULL,
    -- empty: the host itself
    vm TEXT NOT NULL,
    samples INTEGER NOT NULL,
    processor_percent REAL NOT NULL,
    memory_bytes INTEGER NOT NULL,
    network_bytes INTEGER NOT NULL,
    disk_bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX usage_minute ON usage (minute_us);

CREATE TABLE backups (
    id TEXT NOT NULL,
    vm TEXT NOT NULL,
    host TEXT NOT NULL,
    taken_at_us INTEGER NOT NULL,
    command TEXT NOT NULL,
    -- BackupResult, JSON
    body TEXT NOT NULL,
    PRIMARY KEY (id, vm)
) STRICT;

CREATE TABLE answers (
    -- Idempotency-Key
    key TEXT PRIMARY KEY,
    -- digest of method, path and body
    request TEXT NOT NULL,
    status INTEGER NOT NULL,
    body TEXT NOT NULL,
    at_us INTEGER NOT NULL
) STRICT;
