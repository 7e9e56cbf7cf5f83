package ipmasq

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/advice"
)

// MaxFileSize bounds what is read of one file. 65536 prefixes of both families
// take less than half of it.
const MaxFileSize = 16 << 20

// Load reads path, a file or a directory of fragments, and parses it. A missing
// path is no error: it stands for the defaults. After any other error the last
// good list should stay in force.
func Load(path string, p Profile) (List, error) {
	fragments, warnings, err := read(path)
	if err != nil {
		return List{}, err
	}
	return parseAll(fragments, warnings, p)
}

func parseAll(fragments []Fragment, warnings []string, p Profile) (List, error) {
	l, err := Parse(fragments, p)
	if err != nil {
		return List{}, err
	}
	l.Warnings = append(l.Warnings, warnings...)
	return l, nil
}

// Loader loads a path again and again. While the content is the same it answers as
// before without parsing it: with the longest lists that takes a third of a second.
type Loader struct {
	Path    string
	Profile Profile

	loaded bool
	digest [sha256.Size]byte // of everything that was read
	list   List
	err    error
}

// Load is Load of the path as it is now. The list must not be changed.
func (l *Loader) Load() (List, error) {
	fragments, warnings, err := read(l.Path)
	if err != nil {
		l.loaded = false
		return List{}, err
	}
	digest := digestOf(fragments, warnings)
	if l.loaded && digest == l.digest {
		return l.list, l.err
	}
	l.loaded, l.digest = true, digest
	l.list, l.err = parseAll(fragments, warnings, l.Profile)
	return l.list, l.err
}

func digestOf(fragments []Fragment, warnings []string) (d [sha256.Size]byte) {
	h := sha256.New()
	for _, f := range fragments {
		fmt.Fprintf(h, "%q %d\n", f.Path, len(f.Data))
		h.Write(f.Data)
	}
	fmt.Fprintf(h, "%q", warnings)
	h.Sum(d[:0])
	return d
}

func read(path string) (fragments []Fragment, warnings []string, err error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, nil
	case err != nil:
		return nil, nil, fmt.Errorf("%s: %w", path, advice.Bare(err))
	case info.IsDir():
		return readDir(path)
	}
	data, err := readFile(path, info)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil // gone since Stat
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return []Fragment{{path, data}}, nil, nil
}

// IsFragment tells whether a directory entry of that name is read: not the
// kubelet's ..data, hidden files of editors, or their backups.
func IsFragment(name string) bool {
	return !strings.HasPrefix(name, ".") && !strings.HasSuffix(name, "~")
}

// dataLink is the kubelet's: in a volume of ConfigMaps it leads to the directory of the version
// in force, and each name in the volume is a link through it. The names come after a swap and
// go after one, so they are not looked at: the version has all.
const dataLink = "..data"

// readDir reads the fragments of a directory in the order of their names. It reads a volume of
// the kubelet's at one version: lists of two would be merged to one that nobody wrote.
func readDir(dir string) (fragments []Fragment, warnings []string, err error) {
	const tries = 10 // the kubelet swaps once a second at most
	for range tries {
		version, _ := os.Readlink(filepath.Join(dir, dataLink)) // none: not the kubelet's
		fragments, warnings, err = readVersion(dir, version)
		if now, _ := os.Readlink(filepath.Join(dir, dataLink)); now == version {
			return fragments, warnings, err
		}
	}
	return nil, nil, fmt.Errorf("%s: changed while it was read, %d times", dir, tries)
}

// place is a fragment: the path it is known by, and where its content is.
type place struct {
	path, content string
	isLink        bool
}

func readVersion(dir, version string) (fragments []Fragment, warnings []string, err error) {
	places, err := placesIn(dir, version)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range places {
		info, err := os.Stat(p.content)
		if errors.Is(err, fs.ErrNotExist) {
			if p.isLink {
				warnings = append(warnings, p.path+": a symbolic link to nothing, not read")
			}
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", p.path, advice.Bare(err))
		}
		if !info.Mode().IsRegular() {
			continue
		}
		data, err := readFile(p.content, info)
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone since the directory was read
		}
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", p.path, err)
		}
		fragments = append(fragments, Fragment{p.path, data})
	}
	return fragments, warnings, nil
}

// placesIn returns the fragments of a directory, and of the kubelet's version in it.
func placesIn(dir, version string) (places []place, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, advice.Bare(err))
	}
	for _, e := range entries {
		if !IsFragment(e.Name()) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		isLink := e.Type()&fs.ModeSymlink != 0
		if target, _ := os.Readlink(path); version == "" || !strings.HasPrefix(target, dataLink+"/") {
			places = append(places, place{path, path, isLink})
		}
	}
	if version == "" {
		return places, nil
	}
	if !filepath.IsAbs(version) {
		version = filepath.Join(dir, version)
	}
	entries, _ = os.ReadDir(version) // gone: then the link leads elsewhere by now
	for _, e := range entries {
		if IsFragment(e.Name()) {
			places = append(places, place{path: filepath.Join(dir, e.Name()), content: filepath.Join(version, e.Name())})
		}
	}
	slices.SortStableFunc(places, func(a, b place) int { return strings.Compare(a.path, b.path) })
	return places, nil
}

func readFile(path string, info fs.FileInfo) ([]byte, error) {
	if !info.Mode().IsRegular() {
		return nil, errors.New("neither a file nor a directory") // reading a pipe would block
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, advice.Bare(err)
	}
	defer f.Close()
	// One byte more than allowed, so that Parse sees a file that is too long.
	data, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	return data, advice.Bare(err)
}
