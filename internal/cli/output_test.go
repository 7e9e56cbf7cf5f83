package cli

import (
	"bytes"
	"encoding/json"
	"testing"
)

// A list printed by the element is what it would be in one piece.
func TestListByElement(t *testing.T) {
	type entry struct {
		Name string   `json:"name"`
		Of   []string `json:"of,omitempty"`
	}
	for _, list := range [][]entry{{{Name: "a"}}, {{Name: "<&>"}, {Of: []string{"x", "y"}}, {}}} {
		var got bytes.Buffer
		if err := showList(&app{Env: Env{Stdout: &got}}, jsonForm, list, nil); err != nil {
			t.Fatal(err)
		}
		want, err := json.MarshalIndent(list, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != string(want)+"\n" {
			t.Errorf("%s\nwant\n%s", &got, want)
		}
	}
}
