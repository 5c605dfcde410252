//! The schema, as a list of steps. A released step is never changed; `user_version` counts the
//! steps that were applied.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use crate::StoreError;

const STEPS: [&str; 16] = [
    "
    CREATE TABLE users (
        id           TEXT PRIMARY KEY,
        name         TEXT NOT NULL UNIQUE,
        api_key_hash BLOB UNIQUE,
        created_at   TEXT NOT NULL
    ) STRICT;

    INSERT INTO users (id, name, api_key_hash, created_at)
        VALUES ('0000000000000000', 'admin', NULL, strftime('%Y-%m-%dT%H:%M:%fZ'));

    CREATE TABLE sandboxes (
        id          TEXT PRIMARY KEY,
        owner       TEXT NOT NULL REFERENCES users (id),
        name        TEXT NOT NULL,
        state       TEXT NOT NULL CHECK (state IN ('creating', 'running', 'failed', 'destroyed')),
        fail_reason TEXT CHECK ((fail_reason IS NOT NULL) = (state = 'failed')),
        cpus        INTEGER NOT NULL CHECK (cpus > 0),
        memory_mib  INTEGER NOT NULL CHECK (memory_mib > 0),
        environment TEXT NOT NULL,
        created_at  TEXT NOT NULL
    ) STRICT;

    CREATE UNIQUE INDEX sandboxes_name ON sandboxes (owner, name) WHERE state <> 'destroyed';
",
    // Sandboxes that can be saved, their origin and the identity of their guests; named
    // snapshots.
    "
    CREATE TABLE sandboxes_2 (
        id          TEXT PRIMARY KEY,
        owner       TEXT NOT NULL REFERENCES users (id),
        name        TEXT NOT NULL,
        state       TEXT NOT NULL CHECK (state IN ('creating', 'running', 'stopped', 'failed', 'destroyed')),
        fail_reason TEXT CHECK ((fail_reason IS NOT NULL) = (state = 'failed')),
        cpus        INTEGER NOT NULL CHECK (cpus > 0),
        memory_mib  INTEGER NOT NULL CHECK (memory_mib > 0),
        environment TEXT NOT NULL,
        created_at  TEXT NOT NULL,
        keep_hot    INTEGER NOT NULL CHECK (keep_hot IN (0, 1)),
        origin      TEXT NOT NULL,
        agent_token TEXT NOT NULL,
        identity    TEXT
    ) STRICT;

    INSERT INTO sandboxes_2 (id, owner, name, state, fail_reason, cpus, memory_mib, environment, created_at,
                             keep_hot, origin, agent_token, identity)
        SELECT id, owner, name, state, fail_reason, cpus, memory_mib, environment, created_at, 0, 'boot', '', NULL
        FROM sandboxes;
    DROP TABLE sandboxes;
    ALTER TABLE sandboxes_2 RENAME TO sandboxes;
    CREATE UNIQUE INDEX sandboxes_name ON sandboxes (owner, name) WHERE state <> 'destroyed';

    CREATE TABLE snapshots (
        id           TEXT PRIMARY KEY,
        owner        TEXT NOT NULL REFERENCES users (id),
        name         TEXT NOT NULL,
        sandbox_id   TEXT NOT NULL,
        sandbox_name TEXT NOT NULL,
        cpus         INTEGER NOT NULL CHECK (cpus > 0),
        memory_mib   INTEGER NOT NULL CHECK (memory_mib > 0),
        agent_token  TEXT NOT NULL,
        memory_kind  TEXT NOT NULL CHECK (memory_kind IN ('full', 'diff')),
        memory_bytes INTEGER NOT NULL,
        created_at   TEXT NOT NULL,
        UNIQUE (owner, name)
    ) STRICT;
",
    // Quotas of users; labels, secrets, init scripts and lifetimes of sandboxes; events;
    // templates; published ports.
    "
    ALTER TABLE users ADD COLUMN max_sandboxes INTEGER DEFAULT 5 CHECK (max_sandboxes >= 0);
    ALTER TABLE users ADD COLUMN max_cpus INTEGER DEFAULT 4 CHECK (max_cpus >= 0);
    ALTER TABLE users ADD COLUMN max_memory_mib INTEGER DEFAULT 4096 CHECK (max_memory_mib >= 0);
    ALTER TABLE users ADD COLUMN max_snapshots INTEGER DEFAULT 5 CHECK (max_snapshots >= 0);
    UPDATE users SET max_sandboxes = NULL, max_cpus = NULL, max_memory_mib = NULL, max_snapshots = NULL
        WHERE id = '0000000000000000';

    ALTER TABLE sandboxes ADD COLUMN labels TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(labels));
    ALTER TABLE sandboxes ADD COLUMN secrets TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(secrets));
    ALTER TABLE sandboxes ADD COLUMN init TEXT NOT NULL DEFAULT '';
    ALTER TABLE sandboxes ADD COLUMN expires_at INTEGER CHECK (expires_at > 0);
    ALTER TABLE sandboxes ADD COLUMN stopped_at TEXT;
    ALTER TABLE sandboxes ADD COLUMN image TEXT NOT NULL DEFAULT 'minimal';
    ALTER TABLE snapshots ADD COLUMN image TEXT NOT NULL DEFAULT 'minimal';
    CREATE INDEX sandboxes_order ON sandboxes (owner, created_at DESC, id);

    CREATE TABLE secrets (
        owner      TEXT NOT NULL REFERENCES users (id),
        name       TEXT NOT NULL,
        ciphertext BLOB NOT NULL,
        created_at TEXT NOT NULL,
        updated_at TEXT NOT NULL,
        PRIMARY KEY (owner, name)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE templates (
        id          TEXT PRIMARY KEY,
        owner       TEXT NOT NULL REFERENCES users (id),
        name        TEXT NOT NULL,
        image       TEXT NOT NULL,
        cpus        INTEGER NOT NULL CHECK (cpus > 0),
        memory_mib  INTEGER NOT NULL CHECK (memory_mib > 0),
        environment TEXT NOT NULL CHECK (json_valid(environment)),
        labels      TEXT NOT NULL CHECK (json_valid(labels)),
        secrets     TEXT NOT NULL CHECK (json_valid(secrets)),
        init        TEXT NOT NULL,
        created_at  TEXT NOT NULL,
        UNIQUE (owner, name)
    ) STRICT;

    CREATE TABLE events (
        id           INTEGER PRIMARY KEY AUTOINCREMENT,
        at           TEXT NOT NULL,
        kind         TEXT NOT NULL,
        owner        TEXT NOT NULL,
        sandbox_id   TEXT,
        sandbox_name TEXT,
        detail       TEXT NOT NULL CHECK (json_valid(detail))
    ) STRICT;
    CREATE INDEX events_owner ON events (owner, id);

    CREATE TABLE publications (
        alias      TEXT PRIMARY KEY,
        sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
        port       INTEGER NOT NULL CHECK (port BETWEEN 1 AND 65535),
        created_at TEXT NOT NULL,
        UNIQUE (sandbox_id, port)
    ) STRICT;
",
    // Networks; the number that tells this daemon from others on the host.
    "
    CREATE TABLE instance (number INTEGER NOT NULL CHECK (number BETWEEN 1 AND 4294967295)) STRICT;
    INSERT INTO instance VALUES ((random() & 4294967295) | 2147483648);

    CREATE TABLE networks (
        owner  TEXT PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
        number INTEGER NOT NULL UNIQUE CHECK (number >= 0),
        subnet TEXT NOT NULL UNIQUE
    ) STRICT, WITHOUT ROWID;

    ALTER TABLE sandboxes ADD COLUMN network TEXT NOT NULL DEFAULT 'none';
    ALTER TABLE sandboxes ADD COLUMN network_allow TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(network_allow));
    ALTER TABLE sandboxes ADD COLUMN address TEXT;
    CREATE UNIQUE INDEX sandboxes_address ON sandboxes (address) WHERE address IS NOT NULL;
    ALTER TABLE snapshots ADD COLUMN network TEXT NOT NULL DEFAULT 'none';
    ALTER TABLE snapshots ADD COLUMN network_allow TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(network_allow));
",
    // Volumes and their attachments. An attachment without a volume id is a volume of the
    // sandbox's own.
    "
    CREATE TABLE volumes (
        id         TEXT PRIMARY KEY,
        owner      TEXT NOT NULL REFERENCES users (id),
        name       TEXT NOT NULL,
        size_mib   INTEGER NOT NULL CHECK (size_mib > 0),
        work       TEXT CHECK (work IN ('resize', 'clone')),
        created_at TEXT NOT NULL,
        UNIQUE (owner, name)
    ) STRICT;

    CREATE TABLE sandbox_volumes (
        sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
        slot       INTEGER NOT NULL CHECK (slot >= 0),
        name       TEXT NOT NULL,
        volume_id  TEXT REFERENCES volumes (id),
        mount      TEXT NOT NULL,
        read_only  INTEGER NOT NULL CHECK (read_only IN (0, 1)),
        size_mib   INTEGER NOT NULL CHECK (size_mib > 0),
        PRIMARY KEY (sandbox_id, slot)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX sandbox_volumes_volume ON sandbox_volumes (volume_id);

    ALTER TABLE snapshots ADD COLUMN volumes TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(volumes));
    ALTER TABLE users ADD COLUMN max_volumes_mib INTEGER DEFAULT 20480 CHECK (max_volumes_mib >= 0);
    UPDATE users SET max_volumes_mib = NULL WHERE id = '0000000000000000';
",
    // Limit of the disk space that a user's sandboxes and snapshots take on the host.
    "
    ALTER TABLE users ADD COLUMN max_disk_mib INTEGER DEFAULT 51200 CHECK (max_disk_mib >= 0);
    UPDATE users SET max_disk_mib = NULL WHERE id = '0000000000000000';
",
    // Sizes of root disks. NULL means the size of the image.
    "
    ALTER TABLE sandboxes ADD COLUMN disk_mib INTEGER CHECK (disk_mib > 0);
    ALTER TABLE snapshots ADD COLUMN disk_mib INTEGER CHECK (disk_mib > 0);
    ALTER TABLE templates ADD COLUMN disk_mib INTEGER CHECK (disk_mib > 0);
",
    // The node that runs a sandbox, and the epoch of its claim; addresses, which are this host's.
    "
    CREATE TABLE node (id TEXT NOT NULL) STRICT;
    INSERT INTO node VALUES (lower(hex(randomblob(8))));

    ALTER TABLE sandboxes ADD COLUMN node TEXT;
    ALTER TABLE sandboxes ADD COLUMN epoch INTEGER NOT NULL DEFAULT 1 CHECK (epoch > 0);
    UPDATE sandboxes SET node = (SELECT id FROM node);

    CREATE TABLE addresses (
        sandbox_id TEXT PRIMARY KEY REFERENCES sandboxes (id) ON DELETE CASCADE,
        owner      TEXT NOT NULL,
        address    TEXT NOT NULL UNIQUE
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX addresses_owner ON addresses (owner);
    INSERT INTO addresses SELECT id, owner, address FROM sandboxes WHERE address IS NOT NULL;
    DROP INDEX sandboxes_address;
    ALTER TABLE sandboxes DROP COLUMN address;
",
    // Several API keys of a user, with names. `users.api_key_hash` is not used any more.
    "
    CREATE TABLE api_keys (
        owner        TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        name         TEXT NOT NULL,
        hash         BLOB NOT NULL UNIQUE,
        scope        TEXT NOT NULL CHECK (scope IN ('full', 'read')),
        created_at   TEXT NOT NULL,
        expires_at   INTEGER,
        last_used_at INTEGER,
        PRIMARY KEY (owner, name)
    ) STRICT;

    INSERT INTO api_keys (owner, name, hash, scope, created_at)
        SELECT id, 'default', api_key_hash, 'full', created_at FROM users WHERE api_key_hash IS NOT NULL;
    UPDATE users SET api_key_hash = NULL;
",
    // Responses to requests with an idempotency key. Without a status, the request is being
    // carried out.
    "
    CREATE TABLE idempotency (
        owner        TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        key          TEXT NOT NULL,
        created_at   INTEGER NOT NULL,
        request_hash BLOB,
        status       INTEGER,
        body         BLOB,
        PRIMARY KEY (owner, key)
    ) STRICT;

    CREATE INDEX idempotency_age ON idempotency (created_at);
",
    // Users' images. `root` names a file of the host, which several images may have. `manifest`
    // names a blob, and `blobs` all blobs that the image was made from. The settings of an image
    // are copied into its sandboxes, which keep them when the image is gone.
    "
    CREATE TABLE images (
        owner      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        name       TEXT NOT NULL,
        root       TEXT NOT NULL,
        source     TEXT NOT NULL,
        config     TEXT NOT NULL,
        manifest   TEXT,
        blobs      TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        disk_bytes INTEGER NOT NULL,
        created_at TEXT NOT NULL,
        used_at    INTEGER NOT NULL,
        PRIMARY KEY (owner, name)
    ) STRICT;

    CREATE TABLE image_shares (
        owner TEXT NOT NULL,
        name  TEXT NOT NULL,
        user  TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        PRIMARY KEY (owner, name, user),
        FOREIGN KEY (owner, name) REFERENCES images (owner, name) ON DELETE CASCADE
    ) STRICT;

    CREATE INDEX image_shares_user ON image_shares (user);

    ALTER TABLE sandboxes ADD COLUMN image_config TEXT;
    ALTER TABLE snapshots ADD COLUMN image_config TEXT;
",
    // Snapshots that users do not see: the cached results of a template's steps, which are found by
    // a key, and the snapshots that sandboxes of a template start from.
    "
    ALTER TABLE snapshots ADD COLUMN kind TEXT NOT NULL DEFAULT 'named' CHECK (kind IN ('named', 'step', 'template'));
    ALTER TABLE snapshots ADD COLUMN step_key TEXT;
    CREATE UNIQUE INDEX snapshots_step ON snapshots (owner, step_key) WHERE step_key IS NOT NULL;

    ALTER TABLE templates ADD COLUMN snapshot_id TEXT;
",
    // What happens to a sandbox at `expires_at`.
    "
    ALTER TABLE sandboxes ADD COLUMN on_timeout TEXT NOT NULL DEFAULT 'destroy'
        CHECK (on_timeout IN ('destroy', 'stop'));
",
    // What a second API keeps with a sandbox.
    "
    ALTER TABLE sandboxes ADD COLUMN annex TEXT;
",
    "
    ALTER TABLE templates ADD COLUMN annex TEXT;
",
    // Whether all users can create sandboxes from a template.
    "
    ALTER TABLE templates ADD COLUMN public INTEGER NOT NULL DEFAULT 0 CHECK (public IN (0, 1));
",
];

/// Applies the missing steps, each in its own transaction.
pub(crate) fn run(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Open { path: path.to_owned(), source };
    loop {
        // Two daemons that start together are serialized here, and the second finds no missing
        // step.
        let transaction =
            connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        let version: usize = transaction
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(failed)?;
        if version > STEPS.len() {
            return Err(StoreError::Newer { path: path.to_owned(), version, known: STEPS.len() });
        }
        let Some(step) = STEPS.get(version) else { return Ok(()) };
        transaction.execute_batch(step).map_err(failed)?;
        transaction.pragma_update(None, "user_version", version + 1).map_err(failed)?;
        transaction.commit().map_err(failed)?;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rusqlite::Connection;

    use crate::{FILE, Store, StoreError};

    #[test]
    fn store_is_migrated_once() {
        let data = tempfile::tempdir().unwrap();
        Store::open(data.path()).unwrap();

        let again = Store::open(data.path()).unwrap();

        assert_eq!(again.list_users().unwrap().len(), 1);
    }

    #[test]
    fn store_of_a_newer_daemon_is_refused() {
        let data = tempfile::tempdir().unwrap();
        drop(Store::open(data.path()).unwrap());
        let connection = Connection::open(data.path().join(FILE)).unwrap();
        connection.pragma_update(None, "user_version", 999).unwrap();

        let refused = Store::open(data.path());

        assert!(matches!(refused, Err(StoreError::Newer { version: 999, .. })));
    }

    #[test]
    fn error_names_a_file_that_is_not_a_store() {
        let data = tempfile::tempdir().unwrap();
        std::fs::write(
            data.path().join(FILE),
            "not a database, though long enough to be taken for a header",
        )
        .unwrap();

        let Err(StoreError::Open { path, .. }) = Store::open(data.path()) else {
            panic!("the store was opened")
        };

        assert!(path.ends_with(FILE));
    }

    /// A store of the first version: before sandboxes could be saved.
    fn first_version(path: &Path) -> Connection {
        let connection = Connection::open(path.join(FILE)).unwrap();
        connection.execute_batch("PRAGMA journal_mode = WAL;").unwrap();
        connection.execute_batch(super::STEPS[0]).unwrap();
        connection.pragma_update(None, "user_version", 1).unwrap();
        for number in 0..50 {
            let id = format!("{number:016x}");
            let parameters = [id.as_str(), &format!("s{number}")];
            let insert = "INSERT INTO sandboxes VALUES (?1, '0000000000000000', ?2, 'running', NULL, 2, 512, 'A=b', '2026')";
            connection.execute(insert, parameters).unwrap();
        }
        connection
    }

    fn sandboxes(path: &Path) -> Vec<String> {
        let rows = Store::open(path).unwrap().list_all_sandboxes().unwrap();
        assert!(rows.iter().all(|row| row.spec.environment.as_map()["A"] == "b"));
        let mut names: Vec<_> = rows.iter().map(|row| row.spec.name.to_string()).collect();
        names.sort();
        names
    }

    #[test]
    fn death_at_any_point_of_a_migration_loses_no_row() {
        let data = tempfile::tempdir().unwrap();
        let mut connection = first_version(data.path());
        let deaths = tempfile::tempdir().unwrap();
        // Copies the files every few SQLite instructions, as a death at that moment would leave
        // them.
        let (from, to) = (data.path().to_owned(), deaths.path().to_owned());
        let mut count = 0;
        let die = move || {
            count += 1;
            if count % 40 == 0 {
                let place = to.join(count.to_string());
                std::fs::create_dir(&place).unwrap();
                for file in [FILE.to_owned(), format!("{FILE}-wal")] {
                    std::fs::copy(from.join(&file), place.join(&file)).unwrap();
                }
            }
            false
        };
        connection.progress_handler(20, Some(die)).unwrap();

        super::run(&mut connection, data.path()).unwrap();

        drop(connection);
        let all = sandboxes(data.path());
        assert_eq!(all.len(), 50);
        let deaths: Vec<_> = std::fs::read_dir(deaths.path()).unwrap().collect();
        assert!(deaths.len() > 20, "died {} times", deaths.len());
        for death in deaths {
            assert_eq!(sandboxes(&death.unwrap().path()), all);
        }
    }
}
