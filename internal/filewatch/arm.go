package filewatch

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// arm makes the watches fit the file system as it is now. Directories can
// appear while it works, so it looks again until nothing is new.
func (r *run) arm() {
	if r.watcher == nil {
		w, err := r.open()
		if err != nil {
			r.warn("files are polled, changes are seen late (inotify is not available; see fs.inotify.max_user_instances)", err)
			return
		}
		r.watcher, r.watched = w, make(map[string]bool)
	}
	const rounds = 8 // against a directory that changes without end; its events bring us back
	for range rounds {
		wanted := wantedDirs(r.opt.Paths)
		failed := r.add(wanted)
		for dir := range r.watched {
			if !wanted[dir] {
				_ = r.watcher.Remove(dir) // it may be gone with its directory
			}
		}
		r.watched = wanted
		if failed || maps.Equal(wanted, wantedDirs(r.opt.Paths)) {
			if !failed {
				r.warned = false
			}
			return
		}
	}
}

// add adds every watch, also those it has: a directory of the same name may be
// another one by now, and adding one twice costs nothing.
func (r *run) add(dirs map[string]bool) (failed bool) {
	for dir := range dirs {
		if err := r.watcher.Add(dir); err != nil {
			if _, statErr := os.Lstat(dir); statErr != nil {
				continue // gone since it was looked up: the next round finds its ancestor
			}
			failed = true
			r.warn("directory is polled, changes are seen late (see fs.inotify.max_user_watches)", err)
		}
	}
	return failed
}

// warn logs trouble with inotify once until it is over.
func (r *run) warn(text string, err error) {
	if !r.warned {
		r.opt.Log.Warn(text, "error", err, "poll", r.opt.Poll)
		r.warned = true
	}
}

func (r *run) close() {
	if r.watcher != nil {
		_ = r.watcher.Close() // nothing to lose: it only reads
	}
}

// wantedDirs returns the directories to watch for paths.
func wantedDirs(paths []string) map[string]bool {
	dirs := make(map[string]bool)
	for _, p := range paths {
		if dir, ok := walk(p, dirs); ok {
			for _, e := range files(dir) {
				if e.Type()&fs.ModeSymlink != 0 {
					walk(filepath.Join(dir, e.Name()), dirs)
				}
			}
		}
	}
	return dirs
}

// walk follows path as the kernel does and adds each directory in which a change
// can lead elsewhere: that of each symbolic link on the way, that of the file, the
// directory itself, or, when something is missing, where it would appear. A
// directory on the way that is renamed as a whole goes unnoticed until the next
// poll. It returns the directory at the end of path if there is one.
func walk(path string, dirs map[string]bool) (end string, isDir bool) {
	const maxLinks = 40 // the kernel's limit
	here, rest := "/", split(path)
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		if name == "." {
			continue
		}
		if name == ".." {
			here = filepath.Dir(here)
			continue
		}
		next := filepath.Join(here, name)
		info, err := os.Lstat(next)
		switch {
		case err != nil:
			dirs[here] = true
			return "", false
		case info.Mode()&fs.ModeSymlink != 0:
			dirs[here] = true
			target, err := os.Readlink(next)
			if links++; err != nil || links > maxLinks {
				return "", false
			}
			if filepath.IsAbs(target) {
				here = "/"
			}
			rest = append(split(target), rest...)
		case len(rest) == 0:
			dirs[here] = true
			if info.IsDir() {
				dirs[next] = true
			}
			return next, info.IsDir()
		case !info.IsDir():
			dirs[here] = true // a file where a directory should be
			return "", false
		default:
			here = next
		}
	}
	dirs[here] = true
	return here, true
}

// split returns the components of a path without cleaning it: what .. means
// depends on the links before it.
func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}
