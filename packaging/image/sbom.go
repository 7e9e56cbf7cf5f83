package main

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/url"
	"regexp"
	"time"
)

// ownLicense is that of the Go code, and that of the eBPF programs.
const ownLicense = "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"

const noAssertion = "NOASSERTION"

// document is an SPDX 2.3 document: what the image is made of.
type document struct {
	SPDXVersion   string         `json:"spdxVersion"`
	DataLicense   string         `json:"dataLicense"`
	SPDXID        string         `json:"SPDXID"`
	Name          string         `json:"name"`
	Namespace     string         `json:"documentNamespace"`
	Creation      creation       `json:"creationInfo"`
	Packages      []spdxPackage  `json:"packages"`
	Files         []spdxFile     `json:"files"`
	Relationships []relationship `json:"relationships"`
}

type creation struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	SPDXID           string        `json:"SPDXID"`
	Name             string        `json:"name"`
	Version          string        `json:"versionInfo"`
	FileName         string        `json:"packageFileName,omitempty"`
	Supplier         string        `json:"supplier,omitempty"`
	Download         string        `json:"downloadLocation"`
	FilesAnalyzed    bool          `json:"filesAnalyzed"`
	Checksums        []checksum    `json:"checksums,omitempty"`
	Homepage         string        `json:"homepage,omitempty"`
	SourceInfo       string        `json:"sourceInfo,omitempty"`
	LicenseConcluded string        `json:"licenseConcluded"`
	LicenseDeclared  string        `json:"licenseDeclared"`
	Copyright        string        `json:"copyrightText"`
	Purpose          string        `json:"primaryPackagePurpose,omitempty"`
	Refs             []externalRef `json:"externalRefs,omitempty"`
}

type externalRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxFile struct {
	SPDXID           string     `json:"SPDXID"`
	Name             string     `json:"fileName"`
	Types            []string   `json:"fileTypes"`
	Checksums        []checksum `json:"checksums"`
	LicenseConcluded string     `json:"licenseConcluded"`
	Copyright        string     `json:"copyrightText"`
}

type checksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type relationship struct {
	Element string `json:"spdxElementId"`
	Type    string `json:"relationshipType"`
	Related string `json:"relatedSpdxElement"`
}

const (
	idDocument = "SPDXRef-DOCUMENT"
	idImage    = "SPDXRef-Image"
	idBinary   = "SPDXRef-File-bauta"
)

// newDocument describes the image with the binary in it. The name space says which: with the
// binary's digest it stands for one content only, as SPDX asks.
func newDocument(s source, variant, arch string, binary []byte) *document {
	sum, old := sha256.Sum256(binary), sha1.Sum(binary) // SPDX 2.3 wants SHA-1 of every file
	name := fmt.Sprintf("bauta-%s-%s-%s", s.version, variant, arch)
	d := &document{
		SPDXVersion: "SPDX-2.3",
		DataLicense: "CC0-1.0",
		SPDXID:      idDocument,
		Name:        name,
		Namespace:   fmt.Sprintf("%s/spdx/%s-%x", homepage, name, sum[:8]),
		Creation:    creation{s.date.Format(time.RFC3339), []string{"Organization: Bauta", "Tool: bauta-packaging-image"}},
		Packages: []spdxPackage{{
			SPDXID: idImage, Name: "bauta", Version: s.version, Supplier: "Organization: Bauta", Download: noAssertion, Homepage: homepage,
			LicenseConcluded: noAssertion, LicenseDeclared: ownLicense, Copyright: noAssertion, Purpose: "CONTAINER",
		}},
		Files: []spdxFile{{
			SPDXID: idBinary, Name: "./bauta", Types: []string{"BINARY"},
			Checksums:        []checksum{{"SHA1", hex.EncodeToString(old[:])}, {"SHA256", hex.EncodeToString(sum[:])}},
			LicenseConcluded: noAssertion, Copyright: noAssertion,
		}},
		Relationships: []relationship{{idDocument, "DESCRIBES", idImage}, {idImage, "CONTAINS", idBinary}},
	}
	if s.commit != "" {
		d.Packages[0].SourceInfo = "built from commit " + s.commit
	}
	return d
}

var notInID = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

func (d *document) add(kind string, p spdxPackage, from, relation string) {
	p.SPDXID = "SPDXRef-" + kind + "-" + notInID.ReplaceAllString(p.Name, "-")
	p.LicenseConcluded, p.Copyright = noAssertion, noAssertion
	d.Packages = append(d.Packages, p)
	d.Relationships = append(d.Relationships, relationship{from, relation, p.SPDXID})
}

// addModules adds what the binary was linked from.
func (d *document) addModules(list []goModule) {
	for _, m := range list {
		p := spdxPackage{
			Name: m.path, Version: m.version, Download: noAssertion, LicenseDeclared: m.license(), Purpose: "LIBRARY",
			Refs: []externalRef{{"PACKAGE-MANAGER", "purl", "pkg:golang/" + m.path + "@" + m.version}},
		}
		if m.sum != "" {
			p.SourceInfo = "go.sum " + m.sum
		}
		d.add("Go", p, idBinary, "STATIC_LINK")
	}
}

// addPackages adds the packages whose files are in the image.
func (d *document) addPackages(list []debPackage) {
	for _, p := range list {
		d.add("Debian", spdxPackage{
			Name: p.name, Version: p.version, Supplier: "Organization: Debian", Download: noAssertion, LicenseDeclared: debianLicenses[p.name],
			SourceInfo: "a part of the package's files", Checksums: []checksum{{"SHA256", p.sha256}}, Purpose: "LIBRARY",
			Refs: []externalRef{{"PACKAGE-MANAGER", "purl", "pkg:deb/debian/" + p.name + "@" + url.QueryEscape(p.version) + "?arch=" + p.arch + "&distro=" + suite}},
		}, idImage, "CONTAINS")
	}
}
