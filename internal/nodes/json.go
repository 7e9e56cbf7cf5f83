package nodes

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// UnmarshalJSON reads what proxies and small API servers send, which know no protobuf.
func (n *node) UnmarshalJSON(data []byte) error {
	var o struct {
		metav1.TypeMeta `json:",inline"`
		Metadata        struct {
			Name            string            `json:"name"`
			ResourceVersion string            `json:"resourceVersion"`
			Annotations     map[string]string `json:"annotations"`
		} `json:"metadata"`
		Spec struct {
			PodCIDR  string   `json:"podCIDR"`
			PodCIDRs []string `json:"podCIDRs"`
			Taints   []struct {
				Key string `json:"key"`
			} `json:"taints"`
		} `json:"spec"`
		Status struct {
			Addresses []struct {
				Type    string `json:"type"`
				Address string `json:"address"`
			} `json:"addresses"`
		} `json:"status"`
	}
	if err := json.Unmarshal(data, &o); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	*n = node{
		TypeMeta: o.TypeMeta, name: o.Metadata.Name, version: o.Metadata.ResourceVersion, podCIDRs: o.Spec.PodCIDRs,
		initialEnd: o.Metadata.Annotations[metav1.InitialEventsAnnotationKey] == "true",
	}
	n.ranged(o.Spec.PodCIDR)
	for _, t := range o.Spec.Taints {
		n.taints = append(n.taints, t.Key)
	}
	for _, a := range o.Status.Addresses {
		n.addresses = append(n.addresses, address{a.Type, a.Address})
	}
	return nil
}

// readJSONList is readList for JSON: object by object too.
func readJSONList(in *bufio.Reader, each func(*node)) (version string, err error) {
	limit := &bounded{in, maxNode}
	d := json.NewDecoder(limit)
	var kind string
	listed := false
	err = members(d, func(key string) error {
		limit.left = maxNode
		switch key {
		case "kind":
			return d.Decode(&kind)
		case "metadata":
			var meta metav1.ListMeta
			err := d.Decode(&meta)
			version = meta.ResourceVersion
			return err
		case "items":
			listed = true
			return elements(d, func() error {
				limit.left = maxNode
				n := &node{}
				err := d.Decode(n)
				if err == nil && n.name == "" {
					err = errors.New("a Node without a name")
				}
				each(n)
				return err
			})
		}
		return d.Decode(new(json.RawMessage))
	})
	switch {
	case err != nil:
		return "", cut(err)
	case !listed || kind != "" && kind != "NodeList":
		return "", fmt.Errorf("a %q instead of a NodeList", kind)
	}
	return version, nil
}

// bounded reads at most left bytes.
type bounded struct {
	io.Reader
	left int
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("an object of more than %d bytes", maxNode)
	}
	n, err := b.Reader.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// members calls visit for each member of an object: it reads the value.
func members(d *json.Decoder, visit func(key string) error) error {
	if err := expect(d, '{'); err != nil {
		return err
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		if err := visit(key.(string)); err != nil { // where More is true in an object only a string comes
			return err
		}
	}
	return expect(d, '}')
}

// elements calls visit for each element of an array, or of null: it reads the element.
func elements(d *json.Decoder, visit func() error) error {
	switch t, err := d.Token(); {
	case err != nil:
		return err
	case t == nil:
		return nil
	case t != json.Delim('['):
		return fmt.Errorf("%v instead of a list", t)
	}
	for d.More() {
		if err := visit(); err != nil {
			return err
		}
	}
	return expect(d, ']')
}

func expect(d *json.Decoder, want json.Delim) error {
	t, err := d.Token()
	if err == nil && t != want {
		err = fmt.Errorf("%v instead of %v", t, want)
	}
	return err
}
