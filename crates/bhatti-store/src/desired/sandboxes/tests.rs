use bhatti_types::{
    Allowance, CpuCount, DiskMib, FailReason, ImageConfig, MemoryMib, NetworkSpec, OnTimeout,
    Quota, TimeLimit,
};

use super::*;
use crate::Claim;

pub(crate) fn id(number: u8) -> SandboxId {
    SandboxId::from_entropy([number; 8])
}

fn spec(name: &str) -> SandboxSpec {
    let variables = [("A", ""), ("B", "x=y\nz"), ("C", "'\"é")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    SandboxSpec {
        name: name.parse().unwrap(),
        cpus: CpuCount::try_from(2).unwrap(),
        memory: MemoryMib::DEFAULT,
        disk: DiskMib::try_from(8192).ok(),
        environment: Environment::try_from(BTreeMap::from(variables)).unwrap(),
        keep_hot: true,
        labels: Labels::try_from(BTreeMap::from([("k".to_owned(), "v".to_owned())])).unwrap(),
        secrets: vec!["TOKEN".parse().unwrap()],
        init: "echo hi".to_owned(),
        image: "minimal".parse().unwrap(),
        image_config: ImageConfig {
            env: BTreeMap::from([("D".to_owned(), "e".to_owned())]),
            ..ImageConfig::default()
        },
        network: NetworkSpec { mode: NetworkMode::None, allow: Allowance::default() },
        annex: Some("{}".to_owned()),
    }
}

pub(crate) fn new(id: SandboxId) -> NewSandbox {
    NewSandbox {
        id,
        owner: UserId::ADMIN,
        spec: spec("dev"),
        origin: "template x".to_owned(),
        agent_token: "secret".to_owned(),
        time_limit: TimeLimit { expires_at: Some(7), on_timeout: OnTimeout::Stop },
        volumes: Vec::new(),
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    (data, store)
}

#[test]
fn damaged_sandbox_row_is_skipped() {
    for damage in ["labels = '[1]'", "image = ' '", "id = 'x'"] {
        let (_data, store) = store();
        store.insert_sandbox(new(id(1))).unwrap();
        let spec = spec("other");
        store.insert_sandbox(NewSandbox { spec, ..new(id(2)) }).unwrap();
        let sql = format!("UPDATE sandboxes SET {damage} WHERE name = 'other'");
        store.connection.lock().execute(&sql, []).unwrap();

        let all = store.list_all_sandboxes().unwrap();
        let listed = store.list_sandboxes(UserId::ADMIN, &SandboxFilter::default()).unwrap();

        let ids = |rows: Vec<SandboxRow>| rows.iter().map(|row| row.id).collect::<Vec<_>>();
        assert_eq!((ids(all), ids(listed)), (vec![id(1)], vec![id(1)]), "{damage}");
    }
}

#[test]
fn row_is_stored_with_every_field() {
    let (data, store) = store();
    let inserted = store.insert_sandbox(new(id(1))).unwrap();
    store.set_sandbox_identity(&store.claim(id(1)).unwrap(), "{}").unwrap();
    store.set_sandbox_keep_hot(id(1), false).unwrap();
    let identity = Some("{}".to_owned());
    let spec = SandboxSpec { keep_hot: false, ..inserted.spec };
    let expected = SandboxRow { identity, spec, ..inserted };
    drop(store);

    let store = Store::open(data.path()).unwrap();

    assert_eq!(store.find_sandbox(UserId::ADMIN, "dev").unwrap(), Some(expected));
}

#[test]
fn name_is_taken_until_its_sandbox_is_destroyed() {
    let (_data, store) = store();
    store.insert_sandbox(new(id(1))).unwrap();

    let taken = store.insert_sandbox(new(id(2)));
    assert!(matches!(taken, Err(InsertError::NameTaken(_))));

    store.set_sandbox_state(&store.claim(id(1)).unwrap(), SandboxState::Destroyed).unwrap();
    store.insert_sandbox(new(id(3))).unwrap();
    assert_eq!(store.count_sandboxes().unwrap(), 1);
}

#[test]
fn only_the_owner_finds_a_sandbox_by_id_or_name() {
    let (_data, store) = store();
    let other = store
        .insert_user("other".parse().unwrap(), UserId::from_entropy([9; 8]), &[1; 32], Quota::USUAL)
        .unwrap()
        .0
        .id;
    let row = store.insert_sandbox(new(id(1))).unwrap();

    for id_or_name in ["dev", &id(1).to_string()] {
        assert_eq!(store.find_sandbox(UserId::ADMIN, id_or_name).unwrap().as_ref(), Some(&row));
        assert_eq!(store.find_sandbox(other, id_or_name).unwrap(), None);
    }
    assert_eq!(store.list_sandboxes(other, &SandboxFilter::default()).unwrap(), []);
}

#[test]
fn every_state_is_stored() {
    let (_data, store) = store();
    store.insert_sandbox(new(id(1))).unwrap();

    for state in [
        SandboxState::Running,
        SandboxState::Stopped,
        SandboxState::Failed(FailReason::VmmExited),
        SandboxState::Destroyed,
    ] {
        store.set_sandbox_state(&store.claim(id(1)).unwrap(), state).unwrap();
        let row = store.get_sandbox(id(1)).unwrap().unwrap();
        assert_eq!(row.state, state);
        assert_eq!(row.stopped_at.is_some(), state == SandboxState::Stopped);
    }
}

#[test]
fn quota_holds_for_concurrent_inserts() {
    let (_data, store) = store();
    let owner = UserId::from_entropy([9; 8]);
    let quota = Quota { sandboxes: Some(3), cpus_per_sandbox: Some(2), ..Quota::USUAL };
    store.insert_user("other".parse().unwrap(), owner, &[1; 32], quota).unwrap();
    let make = |number: u8, cpus: u64| {
        let mut new = NewSandbox { owner, ..new(id(number)) };
        new.spec.name = format!("s{number}").parse().unwrap();
        new.spec.cpus = CpuCount::try_from(cpus).unwrap();
        store.insert_sandbox(new)
    };

    let made = std::thread::scope(|scope| {
        let makers: Vec<_> = (0..8).map(|n| scope.spawn(move || make(n, 1).is_ok())).collect();
        makers.into_iter().filter_map(|maker| maker.join().ok()).filter(|made| *made).count()
    });

    assert_eq!(made, 3);
    let full = make(9, 1).unwrap_err();
    assert!(matches!(full, InsertError::Quota(QuotaExceeded::Sandboxes { used: 3, max: 3 })));
    let large = make(9, 3).unwrap_err();
    assert!(matches!(large, InsertError::Quota(QuotaExceeded::Cpus { max: 2 })));
}

#[test]
fn admission_inserts_nothing_and_refuses_what_an_insert_refuses() {
    let (_data, store) = store();
    let owner = UserId::from_entropy([9; 8]);
    let quota = Quota { sandboxes: Some(3), ..Quota::USUAL };
    store.insert_user("other".parse().unwrap(), owner, &[1; 32], quota).unwrap();
    let wanted = |numbers: &[u8]| {
        let made = |number: &u8| {
            let mut new = NewSandbox { owner, ..new(id(*number)) };
            new.spec.name = format!("s{number}").parse().unwrap();
            new
        };
        numbers.iter().map(made).collect::<Vec<_>>()
    };

    store.admit_sandboxes(wanted(&[1, 2, 3])).unwrap();
    let full = store.admit_sandboxes(wanted(&[1, 2, 3, 4])).unwrap_err();
    let twice = store.admit_sandboxes(wanted(&[1, 1])).unwrap_err();

    assert!(matches!(full, InsertError::Quota(QuotaExceeded::Sandboxes { used: 3, max: 3 })));
    assert!(matches!(twice, InsertError::NameTaken(_)), "{twice:?}");
    assert!(store.list_all_sandboxes().unwrap().is_empty());
}

#[test]
fn list_is_filtered_by_labels_and_paginated() {
    let (_data, store) = store();
    for number in 1..=5 {
        let mut new = new(id(number));
        new.spec.name = format!("s{number}").parse().unwrap();
        store.insert_sandbox(new).unwrap();
    }
    let change = |key: &str, value: Option<&str>| SandboxChange {
        labels: [(key.to_owned(), value.map(str::to_owned))].into(),
        ..SandboxChange::default()
    };
    store.change_sandbox(id(2), change("k", None)).unwrap();
    store.change_sandbox(id(3), change("x", Some("y"))).unwrap();
    let list = |labels: &[(&str, &str)], after, limit| {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let filter = SandboxFilter { labels, after, limit };
        store.list_sandboxes(UserId::ADMIN, &filter).unwrap()
    };
    let names = |rows: &[SandboxRow]| -> Vec<String> {
        rows.iter().map(|row| row.spec.name.to_string()).collect()
    };

    assert_eq!(names(&list(&[("k", "v")], None, None)), ["s5", "s4", "s3", "s1"]);
    assert_eq!(names(&list(&[("k", "v"), ("x", "y")], None, None)), ["s3"]);
    assert_eq!(names(&list(&[("k", "other")], None, None)), [""; 0]);
    let page = list(&[], None, Some(2));
    let after = page.last().map(|row| (row.created_at.clone(), row.id.to_string()));
    assert_eq!(names(&page), ["s5", "s4"]);
    assert_eq!(names(&list(&[], after, Some(2))), ["s3", "s2"]);
}

#[test]
fn refused_change_changes_nothing() {
    let (_data, store) = store();
    let row = store.insert_sandbox(new(id(1))).unwrap();
    let mut other = new(id(2));
    other.spec.name = "other".parse().unwrap();
    store.insert_sandbox(other).unwrap();
    let change = |name: &str, key: &str| SandboxChange {
        name: Some(name.parse().unwrap()),
        labels: [(key.to_owned(), Some("1".to_owned()))].into(),
    };

    let taken = store.change_sandbox(id(1), change("other", "a"));
    assert!(matches!(taken, Err(ChangeError::NameTaken(_))));
    let bad = store.change_sandbox(id(1), change("new", "a b"));
    assert!(matches!(bad, Err(ChangeError::Label(_))));
    assert_eq!(store.get_sandbox(id(1)).unwrap(), Some(row));

    store.change_sandbox(id(1), change("new", "a")).unwrap();
    let row = store.find_sandbox(UserId::ADMIN, "new").unwrap().unwrap();
    assert_eq!(row.spec.labels.as_map().len(), 2);
}

#[test]
fn change_of_a_missing_sandbox_is_an_error() {
    let (_data, store) = store();

    let claim = Claim { sandbox: id(1), node: store.node(), epoch: 1 };

    let changed = store.set_sandbox_state(&claim, SandboxState::Running);

    assert!(matches!(changed, Err(StoreError::NoSuchRow)));
    assert!(matches!(store.delete_sandbox(&claim), Err(StoreError::NoSuchRow)));
    assert!(matches!(store.claim(id(1)), Err(StoreError::NoSuchRow)));
}
