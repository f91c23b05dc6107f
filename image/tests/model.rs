//! Random layers against a model that is too simple to be wrong: a flat map from path to file, with whiteouts
//! applied to the lower layers before anything of their own layer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
mod support;

use std::collections::BTreeMap;

use cubby_image::PullOptions;
use proptest::prelude::*;
use support::{
    Bench, Compression,
    erofs::Erofs,
    fsck,
    tar::{self, archive},
};

#[derive(Debug, Clone)]
enum Change {
    Dir(String, u32),
    File(String, Vec<u8>),
    Symlink(String),
    Hardlink(String, String),
    Whiteout(String),
    Opaque(String),
}

/// A file's identity, and what it is.
#[derive(Debug, Clone, PartialEq)]
enum Thing {
    Dir(u32),
    File(u32, Vec<u8>),
    Symlink(u32),
}

type Model = BTreeMap<String, Thing>;

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn below(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

/// Puts something at a path; what was there goes, with all below unless both are directories.
fn put(model: &mut Model, path: &str, thing: Thing) {
    for at in 0..path.len() {
        if path.as_bytes()[at] == b'/' {
            model.entry(path[..at].to_owned()).or_insert(Thing::Dir(0o755));
        }
    }
    let both = matches!((model.get(path), &thing), (Some(Thing::Dir(_)), Thing::Dir(_)));
    if !both {
        model.retain(|other, _| !below(other, path));
    }
    model.insert(path.to_owned(), thing);
}

/// Whether an entry makes sense: its parents are directories or missing.
fn has_place(model: &Model, path: &str) -> bool {
    let mut at = parent(path);
    while !at.is_empty() {
        if !matches!(model.get(at), None | Some(Thing::Dir(_))) {
            return false;
        }
        at = parent(at);
    }
    true
}

/// Applies the changes that make sense, and returns them as archive entries.
fn apply(model: &mut Model, changes: &[Change], next: &mut u32) -> Vec<tar::Item> {
    let mut items = Vec::new();
    // A whiteout counts for the lower layers only, wherever it stands; so the model does them all first.
    // What a later entry of this layer needs from below may then be gone, which `has_place` sees.
    for change in changes {
        match change {
            Change::Whiteout(path) if has_place(model, path) => {
                model.retain(|other, _| other != path && !below(other, path));
                let name = format!("{}/.wh.{}", parent(path), path.rsplit('/').next().unwrap());
                items.push(tar::file(name.trim_start_matches('/'), ""));
            }
            Change::Opaque(path)
                if has_place(model, path) && matches!(model.get(path), None | Some(Thing::Dir(_))) =>
            {
                model.retain(|other, _| !below(other, path));
                items.push(tar::file(format!("{path}/.wh..wh..opq"), ""));
            }
            _ => {}
        }
    }
    for change in changes {
        *next += 1;
        match change {
            Change::Dir(path, mode) if has_place(model, path) => {
                put(model, path, Thing::Dir(*mode));
                items.push(tar::dir(path).mode(*mode));
            }
            Change::File(path, data) if has_place(model, path) => {
                put(model, path, Thing::File(*next, data.clone()));
                items.push(tar::file(path, data));
            }
            Change::Symlink(path) if has_place(model, path) => {
                put(model, path, Thing::Symlink(*next));
                items.push(tar::symlink(path, format!("to-{next}")));
            }
            Change::Hardlink(path, target)
                if has_place(model, path) && !below(target, path) && has_place(model, target) =>
            {
                if let Some(thing @ (Thing::File(..) | Thing::Symlink(_))) = model.get(target).cloned() {
                    put(model, path, thing);
                    items.push(tar::hardlink(path, target));
                }
            }
            _ => {}
        }
    }
    items
}

/// Whether whiteouts may be moved among the entries: none of them names what its layer makes anew from below.
fn whiteouts_last(items: Vec<tar::Item>) -> Vec<tar::Item> {
    let is_whiteout = |item: &tar::Item| String::from_utf8_lossy(&item.path).contains(".wh.");
    let (whiteouts, rest): (Vec<_>, Vec<_>) = items.into_iter().partition(is_whiteout);
    [rest, whiteouts].concat()
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "dd"]), 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn change() -> impl Strategy<Value = Change> {
    let size = prop_oneof![Just(0_usize), 1..100_usize, Just(4032), Just(4033), Just(4096), 4000..9000_usize];
    let data =
        (size, any::<u8>()).prop_map(|(size, seed)| (0..size).map(|at| seed ^ at.to_le_bytes()[0]).collect());
    prop_oneof![
        2 => (path(), 0..0o7777_u32).prop_map(|(path, mode)| Change::Dir(path, mode)),
        4 => (path(), data).prop_map(|(path, data)| Change::File(path, data)),
        1 => path().prop_map(Change::Symlink),
        2 => (path(), path()).prop_map(|(path, target)| Change::Hardlink(path, target)),
        2 => path().prop_map(Change::Whiteout),
        1 => path().prop_map(Change::Opaque),
    ]
}

/// What was made, in the model's terms.
fn observed(image: &cubby_image::Image) -> Model {
    let files = Erofs::open(&image.disk).read();
    let mut model = Model::new();
    let mut groups = BTreeMap::new();
    for (path, node) in files.iter().filter(|(path, _)| *path != b"/") {
        let path = String::from_utf8(path[1..].to_vec()).unwrap();
        let fresh = u32::try_from(groups.len()).unwrap();
        let id = *groups.entry(node.same_as.clone()).or_insert(fresh);
        let thing = match node.mode & 0o170_000 {
            0o040_000 => Thing::Dir(node.mode & 0o7777),
            0o120_000 => Thing::Symlink(id),
            _ => Thing::File(id, node.content.clone()),
        };
        model.insert(path, thing);
    }
    model
}

/// Numbers files in the order of their first path, as [`observed`] does.
fn numbered(model: &Model) -> Model {
    let mut ids: BTreeMap<String, u32> = BTreeMap::new();
    let mut id = |key: String| {
        let fresh = u32::try_from(ids.len()).unwrap();
        *ids.entry(key).or_insert(fresh)
    };
    let mut number = |path: &String, thing: &Thing| match thing {
        Thing::Dir(mode) => {
            id(path.clone());
            Thing::Dir(*mode)
        }
        Thing::File(n, data) => Thing::File(id(format!("#{n}")), data.clone()),
        Thing::Symlink(n) => Thing::Symlink(id(format!("#{n}"))),
    };
    model.iter().map(|(path, thing)| (path.clone(), number(path, thing))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_amount_to_what_the_model_says(layers in prop::collection::vec(prop::collection::vec(change(), 0..25), 1..5)) {
        let (mut model, mut next) = (Model::new(), 0);
        let mut archives = Vec::new();
        for changes in &layers {
            archives.push(archive(&apply(&mut model, changes, &mut next)));
        }
        let bench = Bench::new();
        let image = bench.convert(&archives, Compression::Plain, &PullOptions::default()).unwrap();
        fsck(&image);
        prop_assert_eq!(observed(&image), numbered(&model));
    }

    #[test]
    fn the_place_of_a_whiteout_in_its_layer_does_not_matter(lower in prop::collection::vec(change(), 0..25), upper in prop::collection::vec(change(), 0..25)) {
        let (mut model, mut next) = (Model::new(), 0);
        // A symbolic link of a lower layer is followed as long as it is there.
        let lower: Vec<Change> = lower.into_iter().filter(|change| !matches!(change, Change::Symlink(_))).collect();
        let lower = archive(&apply(&mut model, &lower, &mut next));
        // Hard links into a lower layer are resolved when they are read, so they do depend on it.
        let upper: Vec<Change> = upper.into_iter().filter(|change| !matches!(change, Change::Hardlink(..))).collect();
        let items = apply(&mut model, &upper, &mut next);
        let bench = Bench::new();
        let layers = [lower.clone(), archive(&items)];
        let first = observed(&bench.convert(&layers, Compression::Plain, &PullOptions::default()).unwrap());
        // Entries that only fit once the whiteout has made room are an error in the other order.
        let layers = [lower, archive(&whiteouts_last(items))];
        if let Ok(image) = bench.convert(&layers, Compression::Plain, &PullOptions::default()) {
            prop_assert_eq!(observed(&image), first);
        }
    }
}
