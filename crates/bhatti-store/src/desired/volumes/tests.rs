use bhatti_types::Quota;

use super::*;
use crate::InsertError;
use crate::desired::sandboxes::tests::{id, new};

fn store() -> (tempfile::TempDir, Store) {
    let data = tempfile::tempdir().unwrap();
    let store = Store::open(data.path()).unwrap();
    (data, store)
}

fn volume(number: u8, name: &str, size: u64) -> VolumeRow {
    VolumeRow {
        id: VolumeId::from_entropy([number; 8]),
        owner: UserId::ADMIN,
        name: name.parse().unwrap(),
        size: VolumeMib::try_from(size).unwrap(),
        work: None,
        created_at: String::new(),
    }
}

fn named(name: &str, read_only: bool) -> Attach {
    let kind = AttachKind::Named { read_only };
    Attach { name: name.parse().unwrap(), mount: format!("/{name}").parse().unwrap(), kind }
}

fn own(name: &str, size: u64) -> Attach {
    let kind = AttachKind::Own { size: VolumeMib::try_from(size).unwrap(), read_only: false };
    Attach { kind, ..named(name, false) }
}

fn sandbox(store: &Store, number: u8, volumes: Vec<Attach>) -> Result<(), InsertError> {
    let mut new = new(id(number));
    new.spec.name = format!("s{number}").parse().unwrap();
    new.volumes = volumes;
    store.insert_sandbox(new).map(drop)
}

#[test]
fn volumes_are_attached_in_the_requested_order() {
    let (data, store) = store();
    for (number, name) in [(1, "zeta"), (2, "alpha")] {
        store.insert_volume(volume(number, name, 64)).unwrap();
    }
    let wanted = vec![named("zeta", false), named("alpha", true), own("mine", 16)];
    sandbox(&store, 1, wanted).unwrap();
    drop(store);

    let store = Store::open(data.path()).unwrap();

    let row = store.get_sandbox(id(1)).unwrap().unwrap();
    let seen: Vec<_> =
        row.volumes.iter().map(|it| (it.name.as_str(), it.read_only, it.size.get())).collect();
    assert_eq!(seen, [("zeta", false, 64), ("alpha", true, 64), ("mine", false, 16)]);
    assert_eq!(row.volumes[2].volume, None);
}

#[test]
fn volume_has_one_writer_or_any_number_of_readers() {
    let (_data, store) = store();
    store.insert_volume(volume(1, "data", 64)).unwrap();
    sandbox(&store, 1, vec![named("data", true)]).unwrap();
    sandbox(&store, 2, vec![named("data", true)]).unwrap();

    let refused = sandbox(&store, 3, vec![named("data", false)]).unwrap_err();
    assert!(matches!(refused, InsertError::Attach(AttachError::InUse { .. })), "{refused}");
    assert_eq!(store.get_sandbox(id(3)).unwrap(), None, "the refused sandbox left a row");
    let id_of = VolumeId::from_entropy([1; 8]);
    let kept = store.delete_volume(id_of, || Err::<(), _>(VolumeError::Busy("x".parse().unwrap())));
    assert!(
        matches!(kept, Err(VolumeError::InUse { ref sandboxes, .. }) if sandboxes == &["s1", "s2"])
    );

    for number in [1, 2] {
        store.delete_sandbox(&store.claim(id(number)).unwrap()).unwrap();
    }
    sandbox(&store, 3, vec![named("data", false)]).unwrap();
    for read_only in [true, false] {
        assert!(sandbox(&store, 4, vec![named("data", read_only)]).is_err());
    }
    assert!(matches!(
        sandbox(&store, 5, vec![named("nothing", true)]),
        Err(InsertError::Attach(AttachError::NotFound(_)))
    ));
}

#[test]
fn volume_cannot_be_attached_during_work() {
    let (_data, store) = store();
    let row = store.insert_volume(volume(1, "data", 64)).unwrap();
    let size = |mib| VolumeMib::try_from(mib).unwrap();

    let shrunk = store.begin_volume_work(row.id, VolumeWork::Resize, Some(size(63)));
    assert!(matches!(shrunk, Err(VolumeError::Shrinks { .. })));
    store.begin_volume_work(row.id, VolumeWork::Resize, Some(size(128))).unwrap();
    assert!(matches!(
        sandbox(&store, 1, vec![named("data", false)]),
        Err(InsertError::Attach(AttachError::Busy(_)))
    ));
    let second = store.begin_volume_work(row.id, VolumeWork::Clone, None);
    assert!(matches!(second, Err(VolumeError::Busy(_))));
    store.end_volume_work(row.id, size(128)).unwrap();

    sandbox(&store, 1, vec![named("data", true)]).unwrap();
    assert_eq!(store.find_volume(UserId::ADMIN, "data").unwrap().unwrap().size, size(128));
    store.begin_volume_work(row.id, VolumeWork::Clone, None).unwrap();
    store.end_volume_copies().unwrap();
    let in_use = store.begin_volume_work(row.id, VolumeWork::Resize, Some(size(256)));
    assert!(matches!(in_use, Err(VolumeError::InUse { .. })));
}

#[test]
fn quota_counts_named_volumes_and_sandboxes_own_volumes() {
    let (_data, store) = store();
    let quota = Quota { volumes_mib: Some(200), ..Quota::default() };
    store.set_user_quota(UserId::ADMIN, quota).unwrap();
    store.insert_volume(volume(1, "data", 100)).unwrap();
    sandbox(&store, 1, vec![own("mine", 60)]).unwrap();

    let refused = store.insert_volume(volume(2, "more", 41)).unwrap_err();
    assert!(
        matches!(
            refused,
            VolumeError::Quota(QuotaExceeded::Volumes { used: 160, asked: 41, max: 200 })
        ),
        "{refused}"
    );
    assert!(sandbox(&store, 2, vec![own("mine", 41)]).is_err());
    let taken = store.insert_volume(volume(2, "data", 16)).unwrap_err();
    assert!(matches!(taken, VolumeError::NameTaken(_)));

    let data = store.list_volumes(None).unwrap()[0].id;
    let grow = |size| {
        store.begin_volume_work(data, VolumeWork::Resize, Some(VolumeMib::try_from(size).unwrap()))
    };
    let refused = grow(141).unwrap_err();
    assert!(matches!(refused, VolumeError::Quota(_)), "{refused}");
    // The quota is reserved during the growth, and released if the growth fails.
    let row = grow(140).unwrap();
    assert!(store.insert_volume(volume(2, "more", 16)).is_err());
    store.end_volume_work(data, row.size).unwrap();

    store.delete_sandbox(&store.claim(id(1)).unwrap()).unwrap();
    store.insert_volume(volume(2, "more", 100)).unwrap();
}

#[test]
fn volume_row_stays_if_its_files_cannot_be_removed() {
    let (_data, store) = store();
    let row = store.insert_volume(volume(1, "data", 64)).unwrap();

    let failed = store.delete_volume(row.id, || Err(VolumeError::Busy("x".parse().unwrap())));

    assert!(failed.is_err());
    assert_eq!(store.list_volumes(None).unwrap(), [row]);
}
