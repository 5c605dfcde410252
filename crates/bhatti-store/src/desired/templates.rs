//! The table of templates, from which users create sandboxes.

use std::collections::BTreeSet;

use bhatti_types::{
    CpuCount, DiskMib, Environment, ImageName, Labels, MemoryMib, QuotaExceeded, SecretName,
    SnapshotId, TemplateId, TemplateName, UserId,
};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::desired::sandboxes::read_disk;
use crate::{
    CountError, RowName, Store, StoreError, changed_one, check_count, from_json, immediate,
    is_taken, now, parse_secrets, parsed, secrets_text, sound_rows, to_json,
};

const COLUMNS: &str = "id, owner, name, image, cpus, memory_mib, environment, labels, secrets, init, created_at, disk_mib, snapshot_id, annex, public";

/// The maximum number of templates of one user.
const TEMPLATES_MAX: u32 = 200;

/// A template as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRow {
    /// Id of the template.
    pub id: TemplateId,
    /// The owner.
    pub owner: UserId,
    /// Name of the template.
    pub name: TemplateName,
    /// Image of its sandboxes.
    pub image: ImageName,
    /// Number of vCPUs.
    pub cpus: CpuCount,
    /// Size of the memory.
    pub memory: MemoryMib,
    /// Size of the root disk; that of the image if absent.
    pub disk: Option<DiskMib>,
    /// Environment variables.
    pub environment: Environment,
    /// Labels.
    pub labels: Labels,
    /// Names of secrets.
    pub secrets: Vec<SecretName>,
    /// Init script.
    pub init: String,
    /// The snapshot that its sandboxes start from; they boot from the image if absent.
    pub snapshot: Option<SnapshotId>,
    /// What a second API keeps with the template. The store does not read it.
    pub annex: Option<String>,
    /// Whether all users can create sandboxes from it.
    pub public: bool,
    /// When the template was created (RFC 3339); the store sets it.
    pub created_at: String,
}

/// A template could not be added.
#[derive(Debug, thiserror::Error)]
pub enum TemplateInsertError {
    /// The owner has a template of that name.
    #[error("template `{0}` already exists")]
    NameTaken(TemplateName),
    /// The owner has the maximum number of templates.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<CountError> for TemplateInsertError {
    fn from(error: CountError) -> Self {
        match error {
            CountError::TooMany(quota) => Self::Quota(quota),
            CountError::Store(error) => Self::Store(error),
        }
    }
}

impl Store {
    /// Adds a template.
    ///
    /// # Errors
    ///
    /// Returns [`TemplateInsertError::NameTaken`] if the owner has a template of that name.
    pub fn insert_template(&self, row: TemplateRow) -> Result<TemplateRow, TemplateInsertError> {
        let row = TemplateRow { created_at: now(), ..row };
        self.work(|connection| {
            let transaction = immediate(connection)?;
            insert(&transaction, &row)?;
            Ok::<_, TemplateInsertError>(transaction.commit().map_err(StoreError::from)?)
        })?;
        Ok(row)
    }

    /// Adds templates, in place of their owners' templates of those names: all or none. Returns
    /// the ones that were replaced.
    ///
    /// # Errors
    ///
    /// Returns an error if an owner has too many templates, or if the store fails.
    pub fn replace_templates(
        &self,
        rows: &[TemplateRow],
    ) -> Result<Vec<TemplateRow>, TemplateInsertError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            let mut all = Vec::new();
            for row in rows {
                all.extend(find_named(&transaction, row.owner, row.name.as_str())?);
                let (owner, name) = (row.owner.to_string(), row.name.as_str());
                transaction
                    .execute("DELETE FROM templates WHERE owner = ?1 AND name = ?2", [&owner, name])
                    .map_err(StoreError::from)?;
                insert(&transaction, &TemplateRow { created_at: now(), ..row.clone() })?;
            }
            transaction.commit().map_err(StoreError::from)?;
            Ok::<_, TemplateInsertError>(all)
        })
    }

    /// Returns the template with this id or name that `user` can use: an own one, or else a public
    /// one.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_template(
        &self,
        user: UserId,
        id_or_name: &str,
    ) -> Result<Option<TemplateRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM templates
                 WHERE (owner = ?1 OR public) AND (id = ?2 OR name = ?2)
                 ORDER BY id = ?2 DESC, owner = ?1 DESC LIMIT 1"
            ))?;
            let parameters = params![user.to_string(), id_or_name];
            query.query_row(parameters, |row| Ok(read(row))).optional()?.transpose()
        })
    }

    /// Returns the templates that `user` can use, newest first: the own ones, and public ones
    /// whose names no own one has.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_templates(&self, user: UserId) -> Result<Vec<TemplateRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM templates WHERE owner = ?1 OR (public
                     AND name NOT IN (SELECT name FROM templates WHERE owner = ?1))
                 ORDER BY created_at DESC, id"
            ))?;
            sound_rows(&mut query, [user.to_string()], RowName("template", 0), read)
        })
    }

    /// Whether a public template starts from this snapshot.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn is_public_snapshot(&self, id: SnapshotId) -> Result<bool, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM templates WHERE snapshot_id = ?1 AND public)",
            )?;
            Ok(query.query_row([id.to_string()], |row| row.get(0))?)
        })
    }

    /// Returns the ids of the snapshots that templates start from, also those of damaged rows.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn template_snapshots(&self) -> Result<BTreeSet<String>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT snapshot_id FROM templates WHERE snapshot_id IS NOT NULL",
            )?;
            let ids = query.query_map([], |row| row.get(0))?;
            Ok(ids.collect::<Result<_, _>>()?)
        })
    }

    /// Deletes a template. Sandboxes that were created from it stay.
    ///
    /// # Errors
    ///
    /// Returns [`StoreError::NoSuchRow`] if there is no such template.
    pub fn delete_template(&self, id: TemplateId) -> Result<(), StoreError> {
        self.work(|connection| {
            changed_one(
                connection.execute("DELETE FROM templates WHERE id = ?1", [id.to_string()])?,
            )
        })
    }
}

fn insert(connection: &Connection, row: &TemplateRow) -> Result<(), TemplateInsertError> {
    let count = "SELECT count(*) FROM templates WHERE owner = ?1";
    check_count(connection, count, &row.owner.to_string(), "template", TEMPLATES_MAX)?;
    let parameters = params![
        row.id.to_string(),
        row.owner.to_string(),
        row.name.as_str(),
        row.image.as_str(),
        row.cpus.get(),
        row.memory.get(),
        to_json(row.environment.as_map())?,
        to_json(row.labels.as_map())?,
        secrets_text(&row.secrets)?,
        row.init,
        row.created_at,
        row.disk.map(DiskMib::get),
        row.snapshot.map(|snapshot| snapshot.to_string()),
        row.annex,
        row.public,
    ];
    let sql = format!(
        "INSERT INTO templates ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)"
    );
    match connection.execute(&sql, parameters) {
        Ok(_) => Ok(()),
        Err(error) if is_taken(&error) => Err(TemplateInsertError::NameTaken(row.name.clone())),
        Err(error) => Err(TemplateInsertError::Store(error.into())),
    }
}

fn find_named(
    connection: &Connection,
    owner: UserId,
    name: &str,
) -> Result<Option<TemplateRow>, StoreError> {
    let mut query = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM templates WHERE owner = ?1 AND name = ?2"
    ))?;
    query.query_row(params![owner.to_string(), name], |row| Ok(read(row))).optional()?.transpose()
}

fn read(row: &Row<'_>) -> Result<TemplateRow, StoreError> {
    let text = |index: usize| row.get::<_, String>(index);
    Ok(TemplateRow {
        id: parsed(text(0)?.parse())?,
        owner: parsed(text(1)?.parse())?,
        name: parsed(text(2)?.parse())?,
        image: parsed(text(3)?.parse())?,
        cpus: parsed(CpuCount::try_from(row.get::<_, u64>(4)?))?,
        memory: parsed(MemoryMib::try_from(row.get::<_, u64>(5)?))?,
        environment: parsed(Environment::try_from(from_json::<std::collections::BTreeMap<_, _>>(
            &text(6)?,
        )?))?,
        labels: parsed(Labels::try_from(from_json::<std::collections::BTreeMap<_, _>>(&text(
            7,
        )?)?))?,
        secrets: parse_secrets(&text(8)?)?,
        init: text(9)?,
        created_at: text(10)?,
        disk: read_disk(row.get(11)?)?,
        snapshot: row.get::<_, Option<String>>(12)?.map(|id| parsed(id.parse())).transpose()?,
        annex: row.get(13)?,
        public: row.get(14)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_is_stored_with_every_field_until_it_is_deleted() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        let pair = |key: &str, value: &str| {
            std::collections::BTreeMap::from([(key.to_owned(), value.to_owned())])
        };
        let row = TemplateRow {
            id: TemplateId::from_entropy([1; 8]),
            owner: UserId::ADMIN,
            name: "ci".parse().unwrap(),
            image: "minimal".parse().unwrap(),
            cpus: CpuCount::ONE,
            memory: MemoryMib::DEFAULT,
            disk: Some(DiskMib::try_from(8192).unwrap()),
            environment: Environment::try_from(pair("A", "\"1\n")).unwrap(),
            labels: Labels::try_from(pair("k", "v")).unwrap(),
            secrets: vec!["TOKEN".parse().unwrap()],
            init: "echo hi".to_owned(),
            snapshot: Some(SnapshotId::from_entropy([7; 8])),
            annex: Some("{}".to_owned()),
            public: true,
            created_at: String::new(),
        };
        let inserted = store.insert_template(row.clone()).unwrap();

        let found = store.find_template(UserId::ADMIN, "ci").unwrap();
        assert_eq!(found.as_ref(), Some(&inserted));
        let listed = store.list_templates(UserId::ADMIN).unwrap();
        assert_eq!(listed.as_slice(), std::slice::from_ref(&inserted));
        let other = UserId::from_entropy([1; 8]);
        assert_eq!(store.find_template(other, "ci").unwrap(), Some(inserted.clone()));
        assert_eq!(store.list_templates(other).unwrap(), [inserted]);
        assert!(store.is_public_snapshot(SnapshotId::from_entropy([7; 8])).unwrap());
        let private = TemplateRow { public: false, ..row.clone() };
        store.replace_templates(&[private]).unwrap();
        assert_eq!(store.find_template(other, "ci").unwrap(), None);
        assert_eq!(store.list_templates(other).unwrap(), []);
        assert!(!store.is_public_snapshot(SnapshotId::from_entropy([7; 8])).unwrap());
        let again = TemplateRow { id: TemplateId::from_entropy([2; 8]), ..row.clone() };
        let taken = store.insert_template(again);
        assert!(matches!(taken, Err(TemplateInsertError::NameTaken(_))));
        let named = |number, name: &str| TemplateRow {
            id: TemplateId::from_entropy([number; 8]),
            name: name.parse().unwrap(),
            ..row.clone()
        };
        let replaced = store.replace_templates(&[named(3, "ci"), named(4, "ci:v1")]).unwrap();
        assert_eq!(replaced.iter().map(|row| row.id).collect::<Vec<_>>(), [row.id]);
        let twice = store.replace_templates(&[named(5, "other"), named(5, "again")]);
        twice.unwrap_err();
        let listed = store.list_templates(UserId::ADMIN).unwrap();
        let mut names: Vec<_> = listed.into_iter().map(|row| row.name.to_string()).collect();
        names.sort();
        assert_eq!(names, ["ci", "ci:v1"]);
        let row = named(3, "ci");
        store.delete_template(row.id).unwrap();
        assert!(matches!(store.delete_template(row.id), Err(StoreError::NoSuchRow)));
    }
}
