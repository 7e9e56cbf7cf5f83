package filewatch

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

// kubelet writes files as the kubelet's AtomicWriter does: into a new
// directory, to which ..data is then swapped; names that are no more go last.
func kubelet(t *testing.T, dir, version string, content map[string]string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Join(dir, version), 0o755))
	for name, text := range content {
		put(t, filepath.Join(dir, version, name), text)
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			must(t, os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)))
		}
	}
	old, _ := os.Readlink(filepath.Join(dir, "..data"))
	must(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
	must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	for _, e := range files(dir) {
		if _, ok := content[e.Name()]; !ok {
			must(t, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	if old != "" {
		must(t, os.RemoveAll(filepath.Join(dir, old)))
	}
}

// step is one change; says is whether it counts.
type step struct {
	what string
	do   func(t *testing.T, dir string)
	says bool
}

func putStep(what, name, text string, says bool) step {
	return step{what, func(t *testing.T, dir string) { put(t, filepath.Join(dir, name), text) }, says}
}

func renameStep(what, from, to string, says bool) step {
	return step{what, func(t *testing.T, dir string) {
		must(t, os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)))
	}, says}
}

func removeStep(what, name string, says bool) step {
	return step{what, func(t *testing.T, dir string) { must(t, os.RemoveAll(filepath.Join(dir, name))) }, says}
}

func mkdirStep(what, name string, says bool) step {
	return step{what, func(t *testing.T, dir string) { must(t, os.MkdirAll(filepath.Join(dir, name), 0o755)) }, says}
}

func kubeletStep(what, dir, version string, content map[string]string, says bool) step {
	return step{what, func(t *testing.T, root string) { kubelet(t, filepath.Join(root, dir), version, content) }, says}
}

func linkStep(what, target, name string, says bool) step {
	return step{what, func(t *testing.T, dir string) {
		tmp := filepath.Join(dir, "link.tmp")
		must(t, os.Symlink(target, tmp))
		must(t, os.Rename(tmp, filepath.Join(dir, name)))
	}, says}
}

var touchStep = step{"time", func(t *testing.T, dir string) {
	must(t, os.Chtimes(filepath.Join(dir, "f"), time.Now(), time.Unix(1, 0)))
}, false}

var chmodStep = step{"mode", func(t *testing.T, dir string) { must(t, os.Chmod(filepath.Join(dir, "f"), 0o600)) }, false}

var stories = []struct {
	name  string
	path  string // below the test's directory
	setup func(t *testing.T, dir string)
	steps []step
}{
	{name: "a file is created, edited and removed", path: "f", steps: []step{
		putStep("create", "f", "a", true),
		putStep("edit", "f", "b", true),
		touchStep,
		chmodStep,
		putStep("a neighbour", "g", "b", false),
		putStep("renamed over, the new file", "f.new", "c", false),
		renameStep("renamed over", "f.new", "f", true),
		removeStep("remove", "f", true),
		putStep("create again, empty", "f", "", true),
	}},
	{name: "the directory comes and goes", path: "a/b/f", steps: []step{
		mkdirStep("an ancestor", "a", false),
		mkdirStep("the parent", "a/b", false),
		putStep("create", "a/b/f", "a", true),
		removeStep("everything removed", "a", true),
		mkdirStep("both ancestors at once", "a/b", false),
		putStep("create again", "a/b/f", "a", true),
		renameStep("the parent is renamed", "a/b", "a/c", true),
		renameStep("and back", "a/c", "a/b", true),
		putStep("edit", "a/b/f", "b", true),
	}},
	{name: "a ConfigMap", path: "f",
		setup: func(t *testing.T, dir string) { kubelet(t, dir, "..1", map[string]string{"f": "a"}) },
		steps: []step{
			kubeletStep("swap", "", "..2", map[string]string{"f": "b"}, true),
			kubeletStep("swap to the same", "", "..3", map[string]string{"f": "b"}, false),
			kubeletStep("swap again", "", "..4", map[string]string{"f": "c"}, true),
		}},
	{name: "a directory of fragments", path: "d", steps: []step{
		mkdirStep("the directory", "d", true),
		putStep("a fragment", "d/a", "a", true),
		putStep("another", "d/b", "a", true),
		putStep("edit", "d/a", "b", true),
		putStep("hidden", "d/.a.swp", "b", false),
		putStep("backup", "d/a~", "b", false),
		mkdirStep("a directory below", "d/e", false),
		renameStep("rename", "d/a", "d/c", true),
		removeStep("remove one", "d/b", true),
		removeStep("remove all", "d", true),
		mkdirStep("the directory again", "d", true),
		putStep("a fragment again", "d/a", "a", true),
	}},
	{name: "a ConfigMap as directory", path: "d",
		setup: func(t *testing.T, dir string) {
			kubelet(t, filepath.Join(dir, "d"), "..1", map[string]string{"a": "1", "b": "1"})
		},
		steps: []step{
			kubeletStep("swap", "d", "..2", map[string]string{"a": "1", "b": "2"}, true),
			kubeletStep("swap to the same", "d", "..3", map[string]string{"a": "1", "b": "2"}, false),
			kubeletStep("a key more", "d", "..4", map[string]string{"a": "1", "b": "2", "c": "3"}, true),
		}},
	{name: "ConfigMaps come and go", path: "d",
		setup: func(t *testing.T, dir string) { kubelet(t, filepath.Join(dir, "d"), "..1", nil) },
		steps: []step{
			kubeletStep("the first", "d", "..2", map[string]string{"a": "1"}, true),
			kubeletStep("another, which says the same", "d", "..3", map[string]string{"a": "1", "b": "1"}, true),
			kubeletStep("the first goes", "d", "..4", map[string]string{"b": "1"}, true),
			kubeletStep("a swap to the same", "d", "..5", map[string]string{"b": "1"}, false),
			kubeletStep("the last goes", "d", "..6", nil, true),
			kubeletStep("one is back", "d", "..7", map[string]string{"b": "1"}, true),
		}},
	{name: "a link to a file elsewhere", path: "f",
		setup: func(t *testing.T, dir string) {
			must(t, os.MkdirAll(filepath.Join(dir, "x"), 0o755))
			put(t, filepath.Join(dir, "x", "one"), "1")
			put(t, filepath.Join(dir, "x", "two"), "2")
			must(t, os.Symlink(filepath.Join(dir, "x", "one"), filepath.Join(dir, "f")))
		},
		steps: []step{
			putStep("the target is edited", "x/one", "11", true),
			linkStep("another target", "x/two", "f", true),
			putStep("the new target is edited", "x/two", "22", true),
			linkStep("a link to nothing", "x/three", "f", true),
			putStep("which appears", "x/three", "3", true),
			linkStep("a link to itself", "f", "f", true),
		}},
	{name: "a linked directory", path: "d/f",
		setup: func(t *testing.T, dir string) {
			for _, v := range []string{"v1", "v2"} {
				must(t, os.MkdirAll(filepath.Join(dir, v), 0o755))
				put(t, filepath.Join(dir, v, "f"), v)
			}
			must(t, os.Symlink("./v1", filepath.Join(dir, "d")))
		},
		steps: []step{
			linkStep("switched", "v1/../v2", "d", true),
			putStep("edited behind the link", "v2/f", "x", true),
			putStep("edited where the link was", "v1/f", "x", false),
		}},
}
