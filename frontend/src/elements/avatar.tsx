import { initials, pick } from "../format";
import { Icon } from "../icons";

/** Initials on a colour that is always the same for the same user. */
export function Avatar({ name, id, assistant = false, small = false }: { name: string; id: string; assistant?: boolean; small?: boolean }) {
  const tint = assistant ? "spark" : `tint-${pick(id, 8)}`;
  return (
    <span class={`avatar ${tint} ${small ? "small" : ""}`} aria-hidden="true">
      {assistant ? <Icon name="spark" /> : initials(name)}
    </span>
  );
}
