//! The invariants of the design, read off the tree: what is deliberately not there has to stay so.

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use serde_json::Value;
    use suite::root;

    /// Programs that serve a guest's device. Each has the same seven files.
    const DEVICES: [&str; 4] = ["blk", "console", "rng", "virtiofsd"];

    /// Programs of which none may depend on another.
    const PROCESSES: [&str; 6] = ["blk", "console", "outboard", "rng", "virtiofsd", "vmm"];

    /// Where `unsafe` may stand.
    const UNSAFE: [&str; 6] = [
        "backends/virtio/src/memory.rs",
        "backends/sandbox/src/sys.rs",
        "blk/src/engine/uring.rs",
        "virtiofsd/src/sys.rs",
        "vmm/src/kvm",
        "vmm/src/memory.rs",
    ];

    fn metadata() -> Value {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--offline", "--locked"])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// For each crate of ours: the crates of ours it depends on, for building and for running.
    fn arrows() -> BTreeMap<String, BTreeSet<String>> {
        let metadata = metadata();
        let members: Vec<&Value> =
            metadata["packages"].as_array().unwrap().iter().filter(|package| package["source"].is_null()).collect();
        let names: BTreeSet<&str> = members.iter().map(|package| package["name"].as_str().unwrap()).collect();
        let needs = |package: &Value| {
            let all = package["dependencies"].as_array().unwrap().iter();
            let ours = all.filter(|one| one["kind"].is_null()).map(|one| one["name"].as_str().unwrap());
            ours.filter(|name| names.contains(name)).map(str::to_owned).collect()
        };
        members.iter().map(|package| (package["name"].as_str().unwrap().to_owned(), needs(package))).collect()
    }

    /// All Rust files below a folder, with their paths from the root.
    fn sources(below: &str) -> Vec<(String, String)> {
        let words = ["ls-files", "--cached", "--others", "--exclude-standard", "--", below];
        let listed = Command::new("git").args(words).current_dir(root()).output();
        let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let mut paths: Vec<String> = listed.unwrap_or_default().lines().map(str::to_owned).collect();
        if paths.is_empty() {
            walk(&root().join(below), &mut paths);
        }
        paths.retain(|path| path.ends_with(".rs") && root().join(path).exists());
        paths.into_iter().map(|path| (path.clone(), fs::read_to_string(root().join(&path)).unwrap())).collect()
    }

    fn walk(folder: &Path, into: &mut Vec<String>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && !path.ends_with("target") {
                walk(&path, into);
            } else {
                into.push(path.strip_prefix(root()).unwrap().to_string_lossy().into_owned());
            }
        }
    }

    fn is_test(path: &str) -> bool {
        path.starts_with("tests/") || path.starts_with("xtask/") || path.contains("/tests/") || path.ends_with("/tests.rs")
    }

    /// The code of a file, without its tests, comments and strings' worth of prose.
    fn code(text: &str) -> Vec<(usize, &str)> {
        let product = text.lines().take_while(|line| !line.contains("#[cfg(test)]") || line.trim() != "#[cfg(test)]");
        let numbered = product.enumerate().map(|(index, line)| (index + 1, line.trim()));
        numbered.filter(|(_, line)| !line.starts_with("//")).collect()
    }

    #[test]
    fn arrows_point_down() {
        let arrows = arrows();
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(arrows["virtio"], set(&[]));
        assert_eq!(arrows["sandbox"], set(&[]));
        assert_eq!(arrows["image"], set(&[]));
        assert_eq!(arrows["vhost-user"], set(&["virtio"]));
        assert_eq!(arrows["daemon"], set(&["sandbox"]));
        // The fuzzer reaches the parsers of all processes from inside, without a socket.
        for (name, needs) in arrows.iter().filter(|(name, _)| *name != "fuzz") {
            let processes: Vec<_> = needs.iter().filter(|need| PROCESSES.contains(&need.as_str())).collect();
            assert!(processes.is_empty(), "{name} depends on the process {processes:?}: they meet on sockets");
        }
    }

    #[test]
    fn a_folder_is_named_as_its_crate() {
        let metadata = metadata();
        for package in metadata["packages"].as_array().unwrap().iter().filter(|package| package["source"].is_null()) {
            let name = package["name"].as_str().unwrap();
            let folder = PathBuf::from(package["manifest_path"].as_str().unwrap());
            assert_eq!(folder.parent().unwrap().file_name().unwrap().to_str(), Some(name));
            assert!(!["utils", "util", "common", "helpers", "base", "manager"].contains(&name), "{name} says nothing");
        }
    }

    #[test]
    fn one_version_of_each_rust_vmm_crate() {
        let metadata = metadata();
        let packages = metadata["packages"].as_array().unwrap();
        for name in ["vm-memory", "vmm-sys-util", "vhost", "kvm-bindings", "kvm-ioctls", "rustix", "libc", "clap", "thiserror"] {
            let versions: BTreeSet<_> =
                packages.iter().filter(|package| package["name"] == name).map(|package| package["version"].as_str()).collect();
            assert!(versions.len() <= 1, "{name}: {versions:?}");
        }
    }

    #[test]
    fn only_the_floor_names_the_wire_crate() {
        let metadata = metadata();
        for package in metadata["packages"].as_array().unwrap().iter().filter(|package| package["source"].is_null()) {
            let name = package["name"].as_str().unwrap();
            let mut needs = package["dependencies"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap());
            // The independent peer is made of other people's ends on purpose, and shares nothing with ours.
            assert!(
                ["vhost-user", "peer"].contains(&name) || !needs.any(|need| need == "vhost" || need == "virtio-queue"),
                "{name}"
            );
        }
    }

    #[test]
    fn every_device_has_its_seven_files() {
        for device in DEVICES {
            let folder =
                [format!("backends/{device}/src"), format!("{device}/src")].into_iter().find(|path| root().join(path).exists());
            let folder = root().join(folder.unwrap());
            for file in ["main", "lib", "args", "device", "request", "sandbox", "metrics"] {
                assert!(folder.join(format!("{file}.rs")).exists(), "{device} has no {file}.rs");
            }
        }
    }

    #[test]
    fn requests_are_read_without_any_io() {
        for (path, text) in
            sources(".").into_iter().filter(|(path, _)| path.ends_with("/request.rs") && !path.starts_with("tests"))
        {
            assert!(text.contains("#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]"), "{path}");
            for (line, code) in code(&text) {
                let io =
                    ["std::fs", "std::io", "std::net", "rustix", "libc", "std::os"].into_iter().find(|name| code.contains(name));
                assert_eq!(io, None, "{path}:{line}");
            }
        }
    }

    #[test]
    fn unsafe_stands_where_it_can_be_read_in_one_sitting() {
        for (path, text) in sources(".") {
            let allowed = UNSAFE.iter().any(|place| path.starts_with(place));
            for (line, code) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
                let stands = !code.starts_with("//")
                    && (code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl"));
                assert!(allowed || !stands || path == "tests/suite/tidy.rs", "{path}:{line}");
            }
        }
    }

    #[test]
    fn nothing_panics_where_others_can_steer_it() {
        for (path, text) in sources(".").into_iter().filter(|(path, _)| !is_test(path)) {
            for (line, code) in code(&text) {
                let bad = [".unwrap()", ".expect(", "todo!(", "unimplemented!(", "unreachable!(", "panic!("];
                let found = bad.into_iter().find(|word| code.contains(word));
                assert_eq!(found, None, "{path}:{line}: {code}");
            }
        }
    }

    #[test]
    fn modules_are_files_beside_their_folder() {
        for (path, _) in sources(".") {
            assert!(!path.ends_with("/mod.rs"), "{path}");
        }
    }

    #[test]
    fn every_file_opens_with_what_it_is() {
        for (path, text) in sources(".") {
            let first = text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("// SPDX"));
            assert!(first.is_some_and(|line| line.starts_with("//!")), "{path} does not say what lives there");
        }
    }

    #[test]
    fn files_stay_readable() {
        for (path, text) in sources(".").into_iter().filter(|(path, _)| !is_test(path)) {
            assert!(text.lines().count() <= 620, "{path} has {} lines", text.lines().count());
        }
    }

    #[test]
    fn every_counter_counts() {
        for device in DEVICES {
            let all = sources(".").into_iter().filter(|(path, _)| path.contains(&format!("{device}/src/")));
            let text: String = all.clone().filter(|(path, _)| !path.ends_with("metrics.rs")).map(|(_, text)| text).collect();
            let metrics: String = all.filter(|(path, _)| path.ends_with("metrics.rs")).map(|(_, text)| text).collect();
            let shown = "(startup.metrics()?, &metrics::ALL,";
            assert!(text.contains("metrics::publish") && text.contains(shown), "{device} shows no counter");
            for name in metrics.lines().filter_map(|line| line.strip_prefix("pub static ")?.split(':').next()) {
                assert!(text.contains(&format!("metrics::{name}.add(")), "{device}: {name} is never counted");
                assert!(metrics.contains(&format!("&{name},")), "{device}: {name} is not shown");
            }
        }
    }

    #[test]
    fn a_machine_file_knows_the_classes_of_the_vmm() {
        let quoted = |text: &str, before: &str| -> BTreeSet<String> {
            text.split(before).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
        };
        let vmm = fs::read_to_string(root().join("vmm/src/classes.rs")).unwrap();
        let schema = fs::read_to_string(root().join("outboard/src/machine/schema.rs")).unwrap();
        let line = schema.lines().find(|line| line.starts_with("pub const CLASSES")).unwrap();
        let known: BTreeSet<String> = line.split('"').skip(1).step_by(2).map(str::to_owned).collect();
        let rows = vmm.split_once("pub static CLASSES").unwrap().1.split_once("];").unwrap().0;
        assert_eq!(known, quoted(rows, "name: \""));
    }

    #[test]
    fn each_system_call_has_its_reason() {
        for (path, text) in sources(".").into_iter().filter(|(path, _)| path.ends_with("/sandbox.rs")) {
            assert!(!text.contains(", \"\")"), "{path}: a rule without a reason");
        }
    }

    #[test]
    fn links_in_the_documents_lead_somewhere() {
        let mut documents = vec![root().join("README.md"), root().join("CONTRIBUTING.md"), root().join("CHANGELOG.md")];
        documents.extend(fs::read_dir(root().join("docs")).unwrap().flatten().map(|entry| entry.path()));
        for document in documents {
            let text = fs::read_to_string(&document).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
            for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let target = link.split('#').next().unwrap_or_default();
                let local = !target.is_empty() && !target.contains("://");
                assert!(!local || document.parent().unwrap().join(target).exists(), "{}: {link}", document.display());
            }
        }
    }
}
