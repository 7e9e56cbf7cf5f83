package image_test

import (
	"debug/buildinfo"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The SBOM in an image names what its binary says it was linked from, and what scanners find of
// Debian, with licenses; the texts of the modules' licenses are in the image.
func TestSBOMOfImages(t *testing.T) {
	for _, variant := range []string{"ebpf", "iptables"} {
		root := unpacked(t, variant, "amd64")
		text, err := os.ReadFile(filepath.Join(root, "usr/share/doc/bauta/sbom.spdx.json"))
		if err != nil {
			t.Fatal(err)
		}
		if beside, err := os.ReadFile(root + ".tar.spdx.json"); err != nil || string(beside) != string(text) {
			t.Errorf("%v: the document beside the archive is another one", err)
		}
		var doc struct {
			Packages []struct{ Name, VersionInfo, LicenseDeclared string }
		}
		if err := json.Unmarshal(text, &doc); err != nil {
			t.Fatal(err)
		}
		versions := make(map[string]string)
		for _, p := range doc.Packages {
			versions[p.Name] = p.VersionInfo
			if p.LicenseDeclared == "NOASSERTION" {
				t.Errorf("%s: license unknown; if its text is a common one, it belongs to licensePhrases", p.Name)
			}
		}
		want := map[string]string{"bauta": "image-test"}
		info, err := buildinfo.ReadFile(filepath.Join(root, "bauta"))
		if err != nil {
			t.Fatal(err)
		}
		want["stdlib"] = strings.TrimPrefix(info.GoVersion, "go")
		for _, m := range info.Deps {
			want[m.Path] = m.Version
			if found, err := filepath.Glob(filepath.Join(root, "usr/share/doc/bauta/modules", m.Path, "*")); err != nil || len(found) == 0 {
				t.Errorf("%s: no license text (%v)", m.Path, err)
			}
		}
		found, err := filepath.Glob(filepath.Join(root, "var/lib/dpkg/status.d/*"))
		if err != nil || variant == "iptables" && len(found) == 0 {
			t.Fatalf("%s: %v, %v", variant, found, err)
		}
		for _, file := range found {
			control, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(control)) {
				if v, ok := strings.CutPrefix(line, "Version: "); ok {
					want[filepath.Base(file)] = strings.TrimSpace(v)
				}
			}
		}
		for name, version := range want {
			if versions[name] != version {
				t.Errorf("%s: %s has version %q, want %q", variant, name, versions[name], version)
			}
		}
		if len(versions) != len(want) {
			t.Errorf("%s: %d packages, want %d", variant, len(versions), len(want))
		}
	}
}
