package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"bauta.dev/bauta/internal/advice"
)

// unpack writes the files of an image to a new folder, to look at or to run in.
func (a *opened) unpack(dir string) error {
	if len(a.images) != 1 {
		return advice.New(fmt.Errorf("%d images, want one to unpack", len(a.images)), "build an archive of one architecture")
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir) // nothing of the archive gets out of the folder, links included
	if err != nil {
		return err
	}
	files := a.images[0].files
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := writeNode(root, name, files[name]); err != nil {
			return errors.Join(err, root.Close())
		}
	}
	return root.Close()
}

func writeNode(root *os.Root, name string, n node) error {
	mode := fs.FileMode(n.mode)
	var err error
	switch n.kind {
	case tar.TypeSymlink:
		return root.Symlink(n.target, name)
	case tar.TypeDir:
		err = root.Mkdir(name, mode)
	default:
		err = root.WriteFile(name, n.data, mode)
	}
	if err != nil {
		return err
	}
	return root.Chmod(name, mode) // whatever the umask
}
