package chart_test

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// pack packages the chart of a tree and returns the archive.
func pack(t *testing.T, top, version string) (path string) {
	t.Helper()
	if _, err := tools(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(top, "tools/helm/package"), version, t.TempDir())
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// entries are the files of an archive.
func entries(t *testing.T, path string) map[string]string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	z, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		} else if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(time.Unix(1700000000, 0)) || h.Uname != "" || h.Uid != 0 {
			t.Errorf("%s: of %v, by %q %d", h.Name, h.ModTime, h.Uname, h.Uid)
		}
		files[h.Name] = string(text)
	}
}

// The same source gives the same bytes, wherever and whenever it was checked out.
func TestPackageIsReproducible(t *testing.T) {
	t.Parallel()
	copied := t.TempDir()
	for _, dir := range []string{"charts", "tools/helm"} {
		if err := os.CopyFS(filepath.Join(copied, dir), os.DirFS(filepath.Join("../..", dir))); err != nil {
			t.Fatal(err)
		}
	}
	err := filepath.WalkDir(filepath.Join(copied, "charts"), func(name string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chtimes(name, time.Time{}, time.Unix(1, 0)))
	})
	if err != nil {
		t.Fatal(err)
	}
	a, errA := os.ReadFile(pack(t, "../..", "v1.2.3"))
	b, errB := os.ReadFile(pack(t, copied, "v1.2.3"))
	if errA != nil || errB != nil || !slices.Equal(a, b) {
		t.Errorf("%d and %d bytes, not the same (%v, %v)", len(a), len(b), errA, errB)
	}
}

// The archive has the version of the source, all of the chart, and nothing else; helm takes it.
func TestPackage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ app, version string }{
		{"v1.2.3", "1.2.3"}, {"v1.2.3-4-gabcdef0-dirty", "1.2.3-4-gabcdef0-dirty"}, {"0123456", "0.0.0-g0123456"}, {"unknown", "0.0.0-gunknown"},
	} {
		path := pack(t, "../..", c.app)
		if want := "bauta-" + c.version + ".tgz"; filepath.Base(path) != want {
			t.Errorf("%s: %s, want %s", c.app, path, want)
		}
		files := entries(t, path)
		var meta struct{ Name, Version, AppVersion string }
		if err := yaml.Unmarshal([]byte(files["bauta/Chart.yaml"]), &meta); err != nil || meta.Version != c.version || meta.AppVersion != c.app {
			t.Errorf("%s: %+v %v", c.app, meta, err)
		}
		err := filepath.WalkDir(chartDir, func(name string, d fs.DirEntry, err error) error {
			rel, _ := filepath.Rel(chartDir, name)
			if err != nil || d.IsDir() || rel == ".helmignore" || rel == "Chart.yaml" {
				return err
			}
			text, err := os.ReadFile(name)
			if files["bauta/"+rel] != string(text) {
				t.Errorf("%s: %s is missing or another one", c.app, rel)
			}
			delete(files, "bauta/"+rel)
			return err
		})
		if delete(files, "bauta/Chart.yaml"); err != nil || len(files) > 0 {
			t.Errorf("%s: more than the chart: %d files, %v", c.app, len(files), err)
		}
		if out := helm(t, "template", "bauta", path, "--kube-version", kubeVersion); !strings.Contains(out, "image: bauta.dev/bauta:"+c.app+"\n") {
			t.Errorf("%s: the image is not that of the version", c.app)
		}
	}
}
